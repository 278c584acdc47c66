//! Every differentiable op, once. The test below fails for an op that is missing here, lacks a gradient check, or has no
//! row in `KERNELS.md` for the kernel under it.

use crate::checkpoint;
use crate::gradcheck::Case;
use crate::ops;

/// An op of the registry.
pub struct RegisteredOp {
    /// The name that [`crate::Op::name`] gives.
    pub name: &'static str,
    /// The row of `crates/kernels/KERNELS.md` for the kernel that does the work; `None` for pure bookkeeping (views).
    pub kernel: Option<&'static str>,
    /// Float64 inputs at which the gradients are checked; odd seeds give strided inputs.
    pub cases: fn(seed: u64) -> Vec<Case>,
}

macro_rules! registry {
    ($($name:literal, $kernel:expr, $cases:path;)*) => {
        /// All differentiable ops.
        pub const OPS: &[RegisteredOp] = &[$(RegisteredOp { name: $name, kernel: $kernel, cases: $cases },)*];
    };
}

registry! {
    "add", Some("binary"), ops::add::cases;
    "affine", Some("unary"), ops::affine::cases;
    "broadcast_to", Some("reduce"), ops::broadcast_to::cases;
    "checkpoint", None, checkpoint::cases::cases;
    "div", Some("binary"), ops::div::cases;
    "embedding", Some("embedding"), ops::embedding::cases;
    "exp", Some("unary"), ops::exp::cases;
    "head_norm", Some("group_norm"), ops::head_norm::cases;
    "linear", Some("matmul"), ops::linear::cases;
    "linear_cross_entropy", Some("linear_cross_entropy"), ops::linear_cross_entropy::cases;
    "log", Some("unary"), ops::log::cases;
    "matmul", Some("matmul"), ops::matmul::cases;
    "mul", Some("binary"), ops::mul::cases;
    "narrow", Some("accumulate"), ops::narrow::cases;
    "permute", None, ops::permute::cases;
    "reshape", None, ops::reshape::cases;
    "rms_norm", Some("rms_norm"), ops::rms_norm::cases;
    "rope", Some("rope"), ops::rope::cases;
    "sigmoid", Some("unary"), ops::sigmoid::cases;
    "silu", Some("unary"), ops::silu::cases;
    "softmax_attention", Some("softmax_attention"), ops::softmax_attention::cases;
    "stick_breaking_attention", Some("stick_breaking_attention"), ops::stick_breaking_attention::cases;
    "sub", Some("binary"), ops::sub::cases;
    "sum", Some("reduce"), ops::sum::cases;
    "swiglu", Some("swiglu"), ops::swiglu::cases;
    "tanh", Some("unary"), ops::tanh::cases;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gradcheck::Options;
    use crate::tape::Tape;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    #[test]
    fn every_op_passes_its_float64_gradient_checks() {
        for op in OPS {
            // Even seeds give contiguous inputs, odd seeds strided ones.
            for seed in 0..4 {
                let cases = (op.cases)(seed);
                assert!(!cases.is_empty(), "{} has no gradient-check case", op.name);
                for case in cases {
                    let report = case.check(Options::default());
                    let report =
                        report.unwrap_or_else(|e| panic!("{}, case {:?}, seed {seed}: {e}", op.name, case.name));
                    assert!(report.elements > 0, "{}, case {:?}: nothing was compared", op.name, case.name);
                }
            }
        }
    }

    #[test]
    fn the_cases_of_an_op_record_that_op() {
        for op in OPS {
            let recorded = (op.cases)(0).into_iter().any(|case| {
                let tape = Tape::new();
                let inputs: Vec<_> = case.inputs.iter().map(|t| tape.input(t.clone())).collect();
                case.run(&tape, &inputs).expect("the case runs");
                tape.nodes.borrow().iter().any(|node| node.name == op.name)
            });
            assert!(recorded, "no case of {} records an op of that name", op.name);
        }
    }

    #[test]
    fn every_op_in_the_source_is_registered() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files: Vec<_> = fs::read_dir(source.join("ops")).unwrap().map(|f| f.unwrap().path()).collect();
        files.push(source.join("checkpoint.rs"));
        let mut found = BTreeSet::new();
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for implementation in text.split("impl Op for ").skip(1) {
                let name = implementation.split('"').nth(1).unwrap_or_else(|| panic!("{} names no op", file.display()));
                assert!(found.insert(name.to_owned()), "two ops are called {name}");
            }
        }
        let registered: BTreeSet<_> = OPS.iter().map(|op| op.name.to_owned()).collect();
        assert_eq!(found, registered, "ops in the source (left) against the registry (right)");
    }

    #[test]
    fn every_kernel_has_its_row_in_kernels_md() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/KERNELS.md");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for op in OPS {
            if let Some(kernel) = op.kernel {
                let mut first_cells = text.lines().filter_map(|line| line.strip_prefix('|')?.split('|').next());
                let row = first_cells.any(|cell| cell.trim().trim_matches('`') == kernel);
                assert!(row, "op {}: {} has no row {kernel}", op.name, path.display());
            }
        }
    }
}
