//! Causal attention over packed documents: what stick-breaking and softmax attention share.
//!
//! Tokens of several documents lie one after another; a document never sees another one. A token holds its heads
//! contiguously, `[head, head_dim]`; the distance between two tokens is a stride, so that q, k and v may lie in one
//! packed projection. Query head h reads key/value head h / (query_heads / kv_heads) (grouped-query attention in the
//! `repeat_interleave` order).
//!
//! * [`stick_breaking`]: the attention this project is about;
//! * [`softmax`]: the baseline, with optional ALiBi.
//!
//! Memory is linear in the number of tokens: nothing of size tokens x tokens is kept or even held.

pub mod decode;
pub(crate) mod decode_cuda;
#[allow(dead_code, reason = "the plan of stick-breaking attention follows")]
pub(crate) mod device;
#[allow(dead_code, reason = "stick-breaking plan follows")]
pub(crate) mod f32_cuda;
mod gradients;
mod pack;
mod schedule;
pub mod softmax;
pub mod stick_breaking;
mod tile;

use std::ops::Range;

use crate::{KernelError, Result};

/// Sizes and token strides (in elements) of q `[tokens, query_heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`
/// and o `[tokens, query_heads, head_dim]`. The heads of one token are contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionLayout {
    /// Tokens of all documents together.
    pub tokens: usize,
    /// Query heads.
    pub query_heads: usize,
    /// Key/value heads; divides `query_heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Elements from one token's queries to the next token's.
    pub query_stride: usize,
    /// Elements from one token's keys to the next token's.
    pub key_stride: usize,
    /// Elements from one token's values to the next token's.
    pub value_stride: usize,
    /// Elements from one token's output to the next token's; also that of the output's gradient.
    pub output_stride: usize,
}

/// What attention reads. `cu_seqlens` are the document offsets: a leading 0, never decreasing, the last one equal to
/// the number of tokens; two equal neighbours are an empty document.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInputs<'a, T> {
    /// Queries.
    pub q: &'a [T],
    /// Keys.
    pub k: &'a [T],
    /// Values.
    pub v: &'a [T],
    /// Document offsets, documents + 1 of them.
    pub cu_seqlens: &'a [i32],
}

/// Where a backward pass writes, contiguous whatever the strides of the inputs: dq `[tokens, query_heads, head_dim]`,
/// dk and dv `[tokens, kv_heads, head_dim]`. Overwritten in full.
#[derive(Debug)]
pub struct AttentionGradients<'a, T> {
    /// Gradient of the queries.
    pub dq: &'a mut [T],
    /// Gradient of the keys, summed over the query heads that read them.
    pub dk: &'a mut [T],
    /// Gradient of the values, summed over the query heads that read them.
    pub dv: &'a mut [T],
}

impl AttentionLayout {
    /// The layout of contiguous q, k, v and o.
    pub fn contiguous(tokens: usize, query_heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            tokens,
            query_heads,
            kv_heads,
            head_dim,
            query_stride: query_heads * head_dim,
            key_stride: kv_heads * head_dim,
            value_stride: kv_heads * head_dim,
            output_stride: query_heads * head_dim,
        }
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// The key/value head that a query head reads.
    pub fn kv_head(&self, query_head: usize) -> usize {
        query_head / self.group()
    }

    /// Refuses sizes that no kernel can run: no heads, heads that do not divide, strides shorter than a token.
    pub fn validate(&self, op: &'static str) -> Result<()> {
        for (what, size) in
            [("query_heads", self.query_heads), ("kv_heads", self.kv_heads), ("head_dim", self.head_dim)]
        {
            if size == 0 {
                return Err(KernelError::size(op, what, "at least 1", size));
            }
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a multiple of kv_heads ({})", self.kv_heads);
            return Err(KernelError::size(op, "query_heads", expected, self.query_heads));
        }
        let (query_width, kv_width) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim);
        for (what, stride, width) in [
            ("query_stride", self.query_stride, query_width),
            ("key_stride", self.key_stride, kv_width),
            ("value_stride", self.value_stride, kv_width),
            ("output_stride", self.output_stride, query_width),
        ] {
            if stride < width {
                return Err(KernelError::size(op, what, format!("at least {width}"), stride));
            }
        }
        Ok(())
    }

    fn check_inputs<T>(&self, op: &'static str, inputs: &AttentionInputs<'_, T>) -> Result<Vec<Range<usize>>> {
        self.validate(op)?;
        let documents = documents(op, inputs.cu_seqlens, self.tokens)?;
        self.check_rows(op, "q", inputs.q, self.query_stride, self.query_heads)?;
        self.check_rows(op, "k", inputs.k, self.key_stride, self.kv_heads)?;
        self.check_rows(op, "v", inputs.v, self.value_stride, self.kv_heads)?;
        Ok(documents)
    }

    fn check_output<T>(&self, op: &'static str, argument: &'static str, slice: &[T]) -> Result<()> {
        self.check_rows(op, argument, slice, self.output_stride, self.query_heads)
    }

    fn check_gradients<T>(&self, op: &'static str, gradients: &AttentionGradients<'_, T>) -> Result<()> {
        let (query_width, kv_width) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim);
        crate::error::check_len(op, "dq", gradients.dq, self.tokens * query_width)?;
        crate::error::check_len(op, "dk", gradients.dk, self.tokens * kv_width)?;
        crate::error::check_len(op, "dv", gradients.dv, self.tokens * kv_width)
    }

    /// A strided slice may end right after its last token, or run on into what it was cut from.
    fn check_rows<T>(
        &self,
        op: &'static str,
        argument: &'static str,
        slice: &[T],
        stride: usize,
        heads: usize,
    ) -> Result<()> {
        let expected = if self.tokens == 0 { 0 } else { (self.tokens - 1) * stride + heads * self.head_dim };
        if slice.len() < expected {
            return Err(KernelError::Length { op, argument, expected, found: slice.len() });
        }
        Ok(())
    }
}

/// The token ranges of the documents, or an error that names the first offending offset.
pub fn documents(op: &'static str, cu_seqlens: &[i32], tokens: usize) -> Result<Vec<Range<usize>>> {
    let wrong = |position: usize, value: i32, allowed: String| {
        Err(KernelError::Index { op, what: "cu_seqlens", position, value: i64::from(value), allowed })
    };
    let Some((&first, rest)) = cu_seqlens.split_first() else {
        return Err(KernelError::size(op, "the length of cu_seqlens", "documents + 1, at least 1", 0));
    };
    if first != 0 {
        return wrong(0, first, "0".to_owned());
    }
    let mut ranges = Vec::with_capacity(rest.len());
    let mut previous = 0usize;
    for (index, &offset) in rest.iter().enumerate() {
        match usize::try_from(offset) {
            Ok(end) if (previous..=tokens).contains(&end) => {
                ranges.push(previous..end);
                previous = end;
            }
            _ => {
                return wrong(index + 1, offset, format!("between {previous} (the offset before) and {tokens} tokens"));
            }
        }
    }
    if previous != tokens {
        return wrong(rest.len(), previous as i32, format!("the number of tokens, {tokens}"));
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_offsets_may_repeat_and_must_not_decrease() {
        assert_eq!(documents("op", &[0, 3, 3, 7], 7).unwrap(), vec![0..3, 3..3, 3..7]);
        assert_eq!(documents("op", &[0], 0).unwrap(), Vec::<Range<usize>>::new());
        let message = documents("op", &[0, 4, 3, 7], 7).unwrap_err().to_string();
        assert_eq!(message, "op: cu_seqlens[2] = 3, but it must be between 4 (the offset before) and 7 tokens");
        assert!(documents("op", &[1, 7], 7).unwrap_err().to_string().contains("cu_seqlens[0] = 1"));
        assert!(documents("op", &[0, 6], 7).unwrap_err().to_string().contains("cu_seqlens[1] = 6"));
        assert!(documents("op", &[0, -1, 7], 7).is_err());
        assert!(documents("op", &[], 0).is_err());
    }

    #[test]
    fn layouts_that_cannot_run_are_refused() {
        let good = AttentionLayout::contiguous(4, 6, 2, 8);
        assert!(good.validate("op").is_ok());
        assert_eq!((good.group(), good.kv_head(2), good.kv_head(3)), (3, 0, 1));
        for bad in [
            AttentionLayout { kv_heads: 4, ..good },
            AttentionLayout { head_dim: 0, ..good },
            AttentionLayout { query_stride: 47, ..good },
        ] {
            assert!(bad.validate("op").is_err(), "{bad:?}");
        }
    }
}
