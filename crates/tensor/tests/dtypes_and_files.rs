//! Rounding between dtypes, and safetensors files: exact round trips, and errors instead of panics.

use half::bf16;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use stickbreak_tensor::io::{self, NamedTensors};
use stickbreak_tensor::{DType, Tensor};

/// The bfloat16 nearest to a finite number, ties to even, by trying the two candidates around it.
fn nearest_bf16(x: f64) -> bf16 {
    let down = bf16::from_bits((x.abs() as f32).to_bits().min(0x7f7f_ffff).wrapping_shr(16) as u16);
    let candidates = (-1i32..=1).map(|by| bf16::from_bits((i32::from(down.to_bits()) + by).clamp(0, 0x7f80) as u16));
    // Beyond the largest finite number the next one would be 2^128, which is written as infinity.
    let value = |c: bf16| if c.is_infinite() { 2f64.powi(128) } else { f64::from(c) };
    let best = candidates
        .min_by(|a, b| {
            let distance = |c: &bf16| (value(*c) - x.abs()).abs();
            distance(a).total_cmp(&distance(b)).then((a.to_bits() & 1).cmp(&(b.to_bits() & 1)))
        })
        .unwrap();
    if x.is_sign_negative() { -best } else { best }
}

fn rounded(x: f64) -> u16 {
    Tensor::scalar(x).to_dtype(DType::BF16).unwrap().to_vec::<bf16>().unwrap()[0].to_bits()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn float64_to_bfloat16_rounds_once_to_nearest_even(bits in any::<u64>(), exponent in -140..130i32) {
        let wild = f64::from_bits(bits);
        let tame = (1.0 + (bits >> 12) as f64 / (1u64 << 52) as f64) * 2f64.powi(exponent);
        for x in [wild, tame, -tame] {
            if x.is_finite() && x.abs() < 1e38 * 100.0 {
                prop_assert_eq!(rounded(x), nearest_bf16(x).to_bits(), "{:e}", x);
            }
        }
    }

    #[test]
    fn numbers_beside_a_tie_do_not_round_as_the_tie(bits in 0..0x7f7fu16, shift in 9..52u32, above in any::<bool>()) {
        let low = f64::from(bf16::from_bits(bits));
        let high = f64::from(bf16::from_bits(bits + 1));
        let tie = (low + high) / 2.0;
        let off = (high - low) / 2f64.powi(shift as i32);
        let x = if above { tie + off } else { tie - off };
        prop_assume!(x != tie);
        prop_assert_eq!(rounded(x), if above { bits + 1 } else { bits }, "{:e}", x);
        prop_assert_eq!(rounded(tie), bits + (bits & 1));
        let single = Tensor::scalar(x as f32).to_dtype(DType::BF16).unwrap().to_vec::<bf16>().unwrap()[0];
        prop_assert_eq!(single, bf16::from_f32(x as f32));
    }

    #[test]
    fn every_bfloat16_survives_every_wider_float(bits in any::<u16>()) {
        let x = bf16::from_bits(bits);
        let tensor = Tensor::from_vec(vec![x], [1]).unwrap();
        for wider in [DType::F32, DType::F64] {
            let back = tensor.to_dtype(wider).unwrap().to_dtype(DType::BF16).unwrap().to_vec::<bf16>().unwrap()[0];
            prop_assert!(back.to_bits() == bits || (back.is_nan() && x.is_nan()));
        }
    }
}

#[test]
fn conversions_to_integers_drop_the_fraction_and_saturate() {
    let x = Tensor::from_vec(vec![2.7f64, -2.7, 1e20, -1e20, f64::NAN], [5]).unwrap();
    assert_eq!(x.to_dtype(DType::I32).unwrap().to_vec::<i32>().unwrap(), [2, -2, i32::MAX, i32::MIN, 0]);
    assert_eq!(x.to_dtype(DType::U32).unwrap().to_vec::<u32>().unwrap(), [2, 0, u32::MAX, 0, 0]);
}

// ------------------------------------------------------------------------------------------------ files

/// Raw bits of every element.
fn bits(tensor: &Tensor) -> Vec<u64> {
    match tensor.dtype() {
        DType::F32 => tensor.to_vec::<f32>().unwrap().into_iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::F64 => tensor.to_vec::<f64>().unwrap().into_iter().map(f64::to_bits).collect(),
        DType::BF16 => tensor.to_vec::<bf16>().unwrap().into_iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::U32 => tensor.to_vec::<u32>().unwrap().into_iter().map(u64::from).collect(),
        _ => tensor.to_vec::<i32>().unwrap().into_iter().map(|x| x as u64).collect(),
    }
}

/// One tensor of every dtype with arbitrary bits, NaNs included, some of them transposed views.
fn any_tensors() -> impl Strategy<Value = NamedTensors> {
    (prop::collection::vec(any::<u64>(), 24), 0..5usize, any::<bool>()).prop_map(|(raw, rows, view)| {
        let n = rows * 4;
        let make = |tensor: Tensor| if view { tensor.transpose(0, 1).unwrap() } else { tensor };
        let mut tensors = NamedTensors::new();
        let cut = |i: usize| raw[i % 24].rotate_left(i as u32);
        let floats: Vec<f32> = (0..n).map(|i| f32::from_bits(cut(i) as u32)).collect();
        tensors.insert("f32".into(), make(Tensor::from_vec(floats, [rows, 4]).unwrap()));
        let doubles: Vec<f64> = (0..n).map(|i| f64::from_bits(cut(i))).collect();
        tensors.insert("f64".into(), make(Tensor::from_vec(doubles, [rows, 4]).unwrap()));
        let halves: Vec<bf16> = (0..n).map(|i| bf16::from_bits(cut(i) as u16)).collect();
        tensors.insert("bf16".into(), make(Tensor::from_vec(halves, [rows, 4]).unwrap()));
        let unsigned: Vec<u32> = (0..n).map(|i| cut(i) as u32).collect();
        tensors.insert("u32".into(), make(Tensor::from_vec(unsigned, [rows, 4]).unwrap()));
        tensors.insert("i32".into(), Tensor::scalar(cut(1) as i32));
        tensors
    })
}

fn parse(bytes: &[u8]) -> stickbreak_tensor::Result<io::SafetensorsFile> {
    io::parse(Path::new("some.safetensors"), bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn files_come_back_bit_for_bit(tensors in any_tensors(), note in "\\PC{0,20}") {
        let metadata = BTreeMap::from([("note".to_owned(), note)]);
        let bytes = io::serialize(&tensors, &metadata).unwrap();
        prop_assert_eq!(&bytes, &io::serialize(&tensors, &metadata).unwrap(), "the same tensors, other bytes");
        let back = parse(&bytes).unwrap();
        prop_assert_eq!(back.metadata, metadata);
        prop_assert_eq!(back.tensors.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        for (name, tensor) in &tensors {
            let read = &back.tensors[name];
            prop_assert_eq!((read.dtype(), read.shape()), (tensor.dtype(), tensor.shape()));
            prop_assert_eq!(bits(read), bits(tensor), "{}", name);
        }
    }

    #[test]
    fn damaged_files_are_refused_without_a_panic(
        tensors in any_tensors(), cut in any::<prop::sample::Index>(), flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8u32), 1..4),
    ) {
        let bytes = io::serialize(&tensors, &BTreeMap::new()).unwrap();
        let end = cut.index(bytes.len());
        let message = parse(&bytes[..end]).err().map(|e| e.to_string());
        prop_assert!(message.is_some_and(|m| m.starts_with("some.safetensors: not a valid file")), "cut at {}", end);
        prop_assert!(parse(&[&bytes[..], b"\0"].concat()).is_err(), "a byte too many");
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut flipped = bytes.clone();
        for (at, bit) in flips {
            flipped[at.index(header)] ^= 1 << bit;
        }
        // Some flips make another valid header (a name, say); none may panic or read beyond the end.
        if let Ok(file) = parse(&flipped) {
            for tensor in file.tensors.values() {
                prop_assert_eq!(bits(tensor).len(), tensor.elements());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), json in "\\PC{0,40}") {
        let _ = parse(&bytes);
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        let _ = parse(&file);
    }
}

fn with_header(header: &str, data: usize) -> Vec<u8> {
    let padded = format!("{header:<width$}", width = header.len().next_multiple_of(8));
    [&(padded.len() as u64).to_le_bytes()[..], padded.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn headers_that_lie_are_refused() {
    for header in [
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
    ] {
        let message = parse(&with_header(header, 8)).err().unwrap_or_else(|| panic!("accepted: {header}")).to_string();
        assert!(message.starts_with("some.safetensors: "), "{message}");
    }
    assert!(parse(&u64::MAX.to_le_bytes()).is_err());
}

#[test]
fn float16_is_read_as_float32() {
    let header = r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
    let mut bytes = with_header(header, 0);
    bytes.extend([0x00, 0x3c, 0x00, 0xc0]);
    let file = parse(&bytes).unwrap();
    assert_eq!(file.tensors["a"].to_vec::<f32>().unwrap(), [1.0, -2.0]);
}

#[test]
fn files_on_disk_and_what_is_missing_in_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let missing = io::load(&path).unwrap_err().to_string();
    assert!(missing.contains("x.safetensors"), "{missing}");
    let tensors = NamedTensors::from([("a".to_owned(), Tensor::ones([2, 2], DType::F32))]);
    io::save(&path, &tensors, &BTreeMap::new()).unwrap();
    let file = io::load(&path).unwrap();
    assert_eq!(file.tensor(&path, "a").unwrap().to_f64_vec().unwrap(), [1.0; 4]);
    let message = file.tensor(&path, "b").unwrap_err().to_string();
    assert!(message.contains("no tensor \"b\"") && message.contains("[\"a\"]"), "{message}");
}
