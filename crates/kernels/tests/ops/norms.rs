use stickbreak_kernels::group_norm::{self, GroupNormSpec};
use stickbreak_kernels::rms_norm::{self, RmsNormSpec};
use stickbreak_kernels::rope::{self, RopeSpec};

use crate::support::*;

fn rms_formula(spec: &RmsNormSpec, x: &[f64], weight: &[f64]) -> Vec<f64> {
    x.chunks_exact(spec.width)
        .flat_map(|x| {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / spec.width as f64;
            let root = (mean + spec.epsilon).sqrt();
            x.iter().zip(weight).map(move |(x, weight)| x / root * weight).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn rms_norm_matches_the_formula_and_its_derivative() {
    for (rows, width) in [(7, 37), (1, 1), (70, 16)] {
        let spec = RmsNormSpec { rows, width, epsilon: 1e-3 };
        let (x, weight, dout) = (random(1, rows * width), random(2, width), random(3, rows * width));
        let expected = rms_formula(&spec, &x, &weight);

        let (mut out, mut inverse_rms) = (vec![f64::NAN; rows * width], vec![f64::NAN; rows]);
        rms_norm::cpu::forward(&spec, &x, &weight, &mut out, &mut inverse_rms).unwrap();
        assert_close("f64", &out, &expected, 1e-15);
        let (mut out, mut single_rms) = (vec![f32::NAN; rows * width], vec![f32::NAN; rows]);
        rms_norm::cpu::forward(&spec, &single(&x), &single(&weight), &mut out, &mut single_rms).unwrap();
        assert_close("f32", &double(&out), &expected, 3e-7);

        let (mut dx, mut dweight) = (vec![f64::NAN; rows * width], vec![f64::NAN; width]);
        rms_norm::cpu::backward(&spec, &x, &weight, &inverse_rms, &dout, Some(&mut dx), Some(&mut dweight)).unwrap();
        assert_gradient("dx", &x, &dx, |x| dot(&rms_formula(&spec, x, &weight), &dout));
        assert_gradient("dweight", &weight, &dweight, |weight| dot(&rms_formula(&spec, &x, weight), &dout));
        let (mut dx_alone, mut dweight_alone) = (vec![f64::NAN; rows * width], vec![f64::NAN; width]);
        rms_norm::cpu::backward(&spec, &x, &weight, &inverse_rms, &dout, Some(&mut dx_alone), None).unwrap();
        rms_norm::cpu::backward(&spec, &x, &weight, &inverse_rms, &dout, None, Some(&mut dweight_alone)).unwrap();
        assert_eq!((dx_alone, dweight_alone), (dx, dweight));
    }
}

#[test]
fn rms_norm_of_no_rows_has_a_zero_weight_gradient() {
    let spec = RmsNormSpec { rows: 0, width: 5, epsilon: 1e-5 };
    let mut dweight = [f64::NAN; 5];
    rms_norm::cpu::backward(&spec, &[], &[1.0; 5], &[], &[], None, Some(&mut dweight)).unwrap();
    assert_eq!(dweight, [0.0; 5]);
}

#[test]
fn rms_norm_refuses_wrong_lengths() {
    let spec = RmsNormSpec { rows: 2, width: 3, epsilon: 1e-5 };
    let (mut out, mut rms) = ([0f32; 6], [0f32; 2]);
    assert_length_error(rms_norm::cpu::forward(&spec, &[0.0; 5], &[0.0; 3], &mut out, &mut rms), 6, 5);
    assert_length_error(rms_norm::cpu::forward(&spec, &[0.0; 6], &[0.0; 4], &mut out, &mut rms), 3, 4);
    assert_length_error(rms_norm::cpu::forward(&spec, &[0.0; 6], &[0.0; 3], &mut out, &mut rms[1..]), 2, 1);
    let dweight = Some(&mut rms[..]);
    assert_length_error(
        rms_norm::cpu::backward(&spec, &[0.0; 6], &[0.0; 3], &[0.0; 2], &[0.0; 6], None, dweight),
        3,
        2,
    );
}

fn group_formula(spec: &GroupNormSpec, x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let mut out = Vec::new();
    for (group, x) in x.chunks_exact(spec.head_dim).enumerate() {
        let n = spec.head_dim as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        for (d, x) in x.iter().enumerate() {
            let parameter = group % spec.heads * spec.head_dim + d;
            out.push((x - mean) / (variance + spec.epsilon).sqrt() * weight[parameter] + bias[parameter]);
        }
    }
    out
}

#[test]
fn group_norm_matches_the_formula_and_its_derivative() {
    for (tokens, heads, head_dim) in [(5, 3, 11), (40, 2, 8), (1, 1, 33)] {
        let spec = GroupNormSpec { tokens, heads, head_dim, epsilon: 1e-3 };
        let (width, n, groups) = (heads * head_dim, tokens * heads * head_dim, tokens * heads);
        let (x, weight, bias, dout) = (random(1, n), random(2, width), random(3, width), random(4, n));
        let expected = group_formula(&spec, &x, &weight, &bias);

        let (mut out, mut mean, mut inverse_std) = (vec![f64::NAN; n], vec![f64::NAN; groups], vec![f64::NAN; groups]);
        group_norm::cpu::forward(&spec, &x, &weight, &bias, &mut out, &mut mean, &mut inverse_std).unwrap();
        assert_close("f64", &out, &expected, 1e-14);
        let (x32, weight32, bias32) = (single(&x), single(&weight), single(&bias));
        let (mut out32, mut mean32, mut std32) = (vec![f32::NAN; n], vec![f32::NAN; groups], vec![f32::NAN; groups]);
        group_norm::cpu::forward(&spec, &x32, &weight32, &bias32, &mut out32, &mut mean32, &mut std32).unwrap();
        assert_close("f32", &double(&out32), &expected, 5e-7);

        let (mut dx, mut dweight, mut dbias) = (vec![f64::NAN; n], vec![f64::NAN; width], vec![f64::NAN; width]);
        let (want_dx, want_dweight, want_dbias) = (Some(&mut dx[..]), Some(&mut dweight[..]), Some(&mut dbias[..]));
        group_norm::cpu::backward(&spec, &x, &weight, &mean, &inverse_std, &dout, want_dx, want_dweight, want_dbias)
            .unwrap();
        assert_gradient("dx", &x, &dx, |x| dot(&group_formula(&spec, x, &weight, &bias), &dout));
        assert_gradient("dweight", &weight, &dweight, |weight| dot(&group_formula(&spec, &x, weight, &bias), &dout));
        assert_gradient("dbias", &bias, &dbias, |bias| dot(&group_formula(&spec, &x, &weight, bias), &dout));
        let mut dbias_alone = vec![f64::NAN; width];
        let want_dbias = Some(&mut dbias_alone[..]);
        group_norm::cpu::backward(&spec, &x, &weight, &mean, &inverse_std, &dout, None, None, want_dbias).unwrap();
        assert_eq!(dbias_alone, dbias);

        let short = group_norm::cpu::forward(&spec, &x, &weight[1..], &bias, &mut out, &mut mean, &mut inverse_std);
        assert_length_error(short, width, width - 1);
        let short = group_norm::cpu::backward(&spec, &x, &weight, &mean[1..], &inverse_std, &dout, None, None, None);
        assert_length_error(short, groups, groups - 1);
    }
}

#[test]
fn rope_matches_the_formula_and_rotates_back() {
    let (tokens, heads, head_dim) = (200, 3, 10);
    let spec = RopeSpec { tokens, heads, head_dim, theta: 1e4 };
    let mut positions: Vec<u32> = (0..150).chain(0..50).collect();
    positions[199] = 4_000_000;
    let x = random(1, tokens * heads * head_dim);
    let mut expected = vec![0.0; x.len()];
    for_each_index(&[tokens, heads, head_dim / 2], |index| {
        let [t, h, d] = *index else { unreachable!() };
        let angle = f64::from(positions[t]) * 1e4f64.powf(-2.0 * d as f64 / head_dim as f64);
        let low = (t * heads + h) * head_dim + d;
        let (a, b) = (x[low], x[low + head_dim / 2]);
        expected[low] = a * angle.cos() - b * angle.sin();
        expected[low + head_dim / 2] = b * angle.cos() + a * angle.sin();
    });
    let mut out = vec![f64::NAN; x.len()];
    rope::cpu::rotate(&spec, &positions, false, &x, &mut out).unwrap();
    assert_close("f64", &out, &expected, 1e-13);
    let mut back = vec![f64::NAN; x.len()];
    rope::cpu::rotate(&spec, &positions, true, &out, &mut back).unwrap();
    assert_close("back", &back, &x, 1e-13);
    let mut out32 = vec![f32::NAN; x.len()];
    rope::cpu::rotate(&spec, &positions, false, &single(&x), &mut out32).unwrap();
    assert_close("f32", &double(&out32), &expected, 2e-7);
    // The inverse is the transpose: <rotate(x), y> = <x, rotate back(y)>.
    let y = random(2, x.len());
    rope::cpu::rotate(&spec, &positions, true, &y, &mut back).unwrap();
    assert!((dot(&out, &y) - dot(&x, &back)).abs() < 1e-11);

    assert_length_error(rope::cpu::rotate(&spec, &positions[1..], false, &x, &mut out), tokens, tokens - 1);
    assert_length_error(rope::cpu::rotate(&spec, &positions, false, &x[1..], &mut out), x.len(), x.len() - 1);
    let odd = RopeSpec { head_dim: 5, ..spec };
    assert!(rope::cpu::rotate(&odd, &positions, false, &x, &mut out).is_err());
}
