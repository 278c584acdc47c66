//! Golden vectors (float64, computed elsewhere) for both attentions, read from a folder outside of the repository.

mod attention_support;

use std::path::Path;

use attention_support::{assert_close, errors};
use safetensors::SafeTensors;
use stickbreak_kernels::Float;
use stickbreak_kernels::attention::stick_breaking::{StickBreakingOutputs, StickBreakingSpec, cpu, reference};
use stickbreak_kernels::attention::{AttentionGradients, AttentionInputs, AttentionLayout};

struct Case {
    spec: StickBreakingSpec,
    cu_seqlens: Vec<i32>,
    inputs: [Vec<f64>; 5],
    expected: [Vec<f64>; 6],
}

const INPUTS: [&str; 5] = ["q", "k", "v", "do", "drem"];
const EXPECTED: [&str; 6] = ["o", "rem", "log2_rem", "dq", "dk", "dv"];

fn load(path: &Path) -> Case {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    let data = |name: &str| tensors.tensor(name).unwrap().data();
    let f32s = |name: &str| data(name).as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect();
    let f64s = |name: &str| data(name).as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
    let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
    let (q, k) = (shape("q"), shape("k"));
    let layout = AttentionLayout::contiguous(q[0], q[1], k[1], q[2]);
    let spec = StickBreakingSpec {
        scale: metadata["scale"].parse().unwrap(),
        attend_current: metadata["attend_current"] == "true",
        ..StickBreakingSpec::new(layout)
    };
    let cu_seqlens = data("cu_seqlens").as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect();
    Case { spec, cu_seqlens, inputs: INPUTS.map(f32s), expected: EXPECTED.map(f64s) }
}

fn check<T: Float>(name: &str, case: &Case, tensor: f64, row: f64) {
    let [q, k, v, d_o, d_rem] =
        case.inputs.each_ref().map(|values| values.iter().map(|&x| T::from_f64(x)).collect::<Vec<T>>());
    let inputs = AttentionInputs { q: &q, k: &k, v: &v, cu_seqlens: &case.cu_seqlens };
    let mut found = case.expected.each_ref().map(|values| vec![T::from_f64(f64::NAN); values.len()]);
    let [o, rem, log2_rem, dq, dk, dv] = &mut found;
    let outputs = StickBreakingOutputs { o, rem: Some(rem), log2_rem: Some(log2_rem) };
    let saved = cpu::forward(&case.spec, &inputs, outputs).unwrap();
    let gradients = AttentionGradients { dq, dk, dv };
    cpu::backward(&case.spec, &inputs, &d_o, Some(&d_rem), &saved, gradients).unwrap();
    let width = case.spec.layout.head_dim;
    let widths = [width, 1, 1, width, width, width];
    let mut report = String::new();
    for (index, what) in EXPECTED.iter().enumerate() {
        let errors = errors(&found[index], &case.expected[index], widths[index]);
        report += &format!("  {what} {:.0e}/{:.0e}", errors.tensor, errors.row);
    }
    println!("{name:32} {} {report}", T::NAME);
    for (index, what) in EXPECTED.iter().enumerate() {
        let what = format!("{name}: {what}");
        assert_close(&what, &found[index], &case.expected[index], widths[index], tensor, row);
    }
}

#[test]
#[ignore = "needs STICKBREAK_VECTORS=<folder with attention/*.safetensors>"]
fn stick_breaking_matches_the_golden_vectors() {
    let folder = std::env::var("STICKBREAK_VECTORS").expect("STICKBREAK_VECTORS names the folder of golden vectors");
    let mut paths: Vec<_> = std::fs::read_dir(Path::new(&folder).join("attention"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty());
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let case = load(&path);
        check::<f64>(&name, &case, 1e-9, 1e-9);
        check::<f32>(&name, &case, 2e-5, 1e-4);
        let [q, k, v, d_o, d_rem] = &case.inputs;
        let inputs = AttentionInputs { q, k, v, cu_seqlens: &case.cu_seqlens };
        let dense = reference::forward(&case.spec, &inputs).unwrap();
        let gradients = reference::backward(&case.spec, &inputs, d_o, Some(d_rem)).unwrap();
        let dense = [dense.o, dense.rem, dense.log2_rem, gradients.dq, gradients.dk, gradients.dv];
        for (what, (found, expected)) in EXPECTED.iter().zip(dense.iter().zip(&case.expected)) {
            assert_close(&format!("{name}: dense {what}"), found, expected, 1, 1e-9, 1e-9);
        }
    }
}
