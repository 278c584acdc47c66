//! `stickbreak generate`.

use crate::load::{ComputeOptions, LoadedModel};
use crate::signal::StopFlag;
use anyhow::Result;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;
use stickbreak_model::Sampling;

#[derive(Args)]
pub(super) struct GenerateArgs {
    /// A run's folder, one of its checkpoints, or a model folder in the Hugging Face layout.
    model: PathBuf,
    /// What to continue.
    #[arg(long, default_value = "")]
    prompt: String,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Divides the logits; 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Only the k most likely tokens; 0 takes all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the most likely tokens that together reach this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    compute: ComputeOptions,
}

pub(super) fn run(args: GenerateArgs) -> Result<()> {
    let loaded = LoadedModel::open(&args.model, args.compute)?;
    let stop = StopFlag::on_signals()?;
    let end = loaded.tokenizer.end_of_text();
    let mut prompt = vec![end];
    prompt.extend(loaded.tokenizer.encode(&args.prompt)?);
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        vocabulary: Some(loaded.tokenizer.vocab_size()),
        seed: args.seed,
    };
    let mut out = std::io::stdout().lock();
    write!(out, "{}", args.prompt)?;
    let mut printer = Printer::default();
    let mut failed = None;
    loaded.model.generate(&prompt, args.tokens, &sampling, Some(end), |token| {
        let written = loaded.tokenizer.decode_bytes(&[token]).map_err(anyhow::Error::from).and_then(|bytes| {
            out.write_all(printer.push(&bytes).as_bytes())?;
            Ok(out.flush()?)
        });
        failed = written.err();
        failed.is_none() && !stop.is_set()
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    writeln!(out, "{}", printer.finish())?;
    Ok(())
}

/// Bytes to text as they come: a character may span several tokens.
#[derive(Default)]
struct Printer {
    pending: Vec<u8>,
}

impl Printer {
    /// The text that is complete with these bytes; bytes that cannot be UTF-8 become U+FFFD.
    fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid: Vec<u8> = self.pending.drain(..error.valid_up_to()).collect();
                    text.push_str(&String::from_utf8_lossy(&valid));
                    match error.error_len() {
                        Some(wrong) => {
                            self.pending.drain(..wrong);
                            text.push('\u{fffd}');
                        }
                        // The beginning of a character: wait for the rest.
                        None => return text,
                    }
                }
            }
        }
    }

    fn finish(self) -> &'static str {
        if self.pending.is_empty() { "" } else { "\u{fffd}" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_span_tokens_and_broken_bytes_print_well() {
        let mut printer = Printer::default();
        let text: String = "aé€😀".bytes().map(|byte| printer.push(&[byte])).collect();
        assert_eq!(text, "aé€😀");
        assert_eq!(printer.push(b"\xffx\xe2\x82"), "\u{fffd}x");
        assert_eq!(printer.finish(), "\u{fffd}");
    }
}
