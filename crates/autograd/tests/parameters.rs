//! Parameters in the arena: accumulation in place, and the moment at which a gradient is complete.

use std::cell::RefCell;
use std::rc::Rc;
use stickbreak_autograd::ops::{embedding, linear};
use stickbreak_autograd::{
    ALIGNMENT, ArenaBuilder, ArenaLayout, BeforeUse, Parameter, ParameterArena, ParameterId, Result, Tape, Var,
    checkpoint,
};
use stickbreak_tensor::{DType, Device, Tensor};

/// Table `[5, 4]` (used as embedding and as output: tied), two matrices `[4, 4]`, and one that is never used.
fn arena() -> ParameterArena {
    let mut builder = ArenaBuilder::default();
    for (name, shape) in [("table", [5, 4]), ("first", [4, 4]), ("second", [4, 4]), ("unused", [2, 2])] {
        builder.add(name, shape);
    }
    let arena = builder.build(DType::F64);
    for (i, (entry, parameter)) in arena.iter().enumerate() {
        parameter.value.copy_assign(&Tensor::randn(0.0, 0.5, &entry.shape, DType::F64, i as u64).unwrap()).unwrap();
    }
    arena
}

fn parameters(arena: &ParameterArena) -> Vec<Parameter> {
    arena.iter().map(|(_, parameter)| parameter).collect()
}

/// A block that uses one of its matrices twice and its input three times.
fn block<'t>(x: &Var<'t>, first: &Parameter, second: &Parameter) -> Result<Var<'t>> {
    let tape = x.tape();
    let h = linear(x, &tape.parameter(first))?.tanh()?;
    let h = linear(&h, &tape.parameter(second))?.mul(x)?;
    x.add(&linear(&h, &tape.parameter(first))?)
}

fn loss<'t>(tape: &'t Tape, arena: &ParameterArena, recompute: bool) -> Result<Var<'t>> {
    let [table, first, second, unused] = parameters(arena).try_into().expect("four parameters");
    let ids = Tensor::from_vec(vec![3u32, 0, 3, 1], [4])?;
    tape.parameter(&unused);
    let mut x = embedding(&ids, &tape.parameter(&table))?;
    for _ in 0..2 {
        x = if recompute {
            let (first, second) = (first.clone(), second.clone());
            checkpoint(tape, &[&x], move |_, v| block(&v[0], &first, &second))?
        } else {
            block(&x, &first, &second)?
        };
    }
    let logits = linear(&x, &tape.parameter(&table))?;
    logits.mul(&logits)?.mean_all()
}

/// Runs one step; returns each parameter's gradient when it was announced, in the order of announcement.
fn step(arena: &ParameterArena, recompute: bool) -> Vec<(ParameterId, Vec<f64>)> {
    let tape = Tape::new();
    let loss = loss(&tape, arena, recompute).unwrap();
    let mut announced = Vec::new();
    tape.backward_with(&loss, 1.0, &mut |id| {
        announced.push((id, arena.parameter(id).unwrap().gradient.to_f64_vec().unwrap()));
    })
    .unwrap();
    announced
}

#[test]
fn every_parameter_is_announced_once_and_only_when_complete() {
    for recompute in [false, true] {
        let arena = arena();
        let announced = step(&arena, recompute);
        let mut ids: Vec<_> = announced.iter().map(|(id, _)| id.0).collect();
        // The table is complete last of all: its first use is at the very start.
        assert_eq!(ids.last(), Some(&0), "recompute {recompute}");
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3], "recompute {recompute}");
        for (id, gradient) in announced {
            let now = arena.parameter(id).unwrap().gradient.to_f64_vec().unwrap();
            assert_eq!(now, gradient, "parameter {} changed after it was announced, recompute {recompute}", id.0);
            assert_eq!(id.0 != 3, now.iter().any(|&g| g != 0.0), "parameter {}", id.0);
        }
    }
}

#[test]
fn a_matrix_is_announced_before_the_backward_pass_reaches_older_ops() {
    let arena = arena();
    let [table, first, second, _] = parameters(&arena).try_into().expect("four parameters");
    let tape = Tape::new();
    let x = linear(&tape.constant(Tensor::ones([3, 4], DType::F64)), &tape.parameter(&first)).unwrap();
    let x = linear(&x, &tape.parameter(&second)).unwrap();
    let loss = linear(&x, &tape.parameter(&table)).unwrap().sum_all().unwrap();
    let mut order = Vec::new();
    tape.backward_with(&loss, 1.0, &mut |id| {
        order.push(id.0);
        if id == second.id {
            assert!(
                first.gradient.to_f64_vec().unwrap().iter().all(|&g| g == 0.0),
                "second is ready before first has begun"
            );
        }
    })
    .unwrap();
    assert_eq!(order, [0, 2, 1]);
}

#[test]
fn a_parameter_that_is_the_loss_itself_is_announced() {
    let mut builder = ArenaBuilder::default();
    let id = builder.add("s", []);
    let parameter = builder.build(DType::F64).parameter(id).unwrap();
    let tape = Tape::new();
    let mut announced = Vec::new();
    tape.backward_with(&tape.parameter(&parameter), 3.0, &mut |id| announced.push(id)).unwrap();
    assert_eq!((announced, parameter.gradient.to_scalar().unwrap()), (vec![id], 3.0));
}

#[test]
fn two_backward_passes_add_up() {
    let arena = arena();
    step(&arena, false);
    let once = arena.gradients().to_f64_vec().unwrap();
    step(&arena, false);
    for (twice, once) in arena.gradients().to_f64_vec().unwrap().into_iter().zip(once) {
        assert!((twice - 2.0 * once).abs() <= 1e-14 * once.abs(), "{twice} is not twice {once}");
    }
    arena.zero_gradients().unwrap();
    assert!(arena.gradients().to_f64_vec().unwrap().iter().all(|&g| g == 0.0));
}

#[test]
fn gaps_of_the_arena_stay_zero() {
    let arena = arena();
    step(&arena, false);
    for tensor in [arena.values(), arena.gradients()] {
        let flat = tensor.to_f64_vec().unwrap();
        let inside = |i: usize| arena.entries().iter().any(|entry| entry.range.contains(&i));
        assert!((0..flat.len()).filter(|&i| !inside(i)).all(|i| flat[i] == 0.0));
    }
    assert_eq!(arena.parameter_count(), 20 + 16 + 16 + 4);
}

#[test]
fn the_scale_of_the_loss_scales_gradients() {
    let gradient_at = |scale: f64| {
        let arena = arena();
        let tape = Tape::new();
        let loss = loss(&tape, &arena, false).unwrap();
        tape.backward_with(&loss, scale, &mut |_| {}).unwrap();
        arena.gradients().to_f64_vec().unwrap()
    };
    // A power of two changes no mantissa.
    assert_eq!(gradient_at(0.25), gradient_at(1.0).iter().map(|g| g * 0.25).collect::<Vec<_>>());
}

#[test]
fn every_parameter_is_told_of_before_it_is_read_with_and_without_recompute() {
    for recompute in [false, true] {
        let arena = arena();
        let values: Vec<Tensor> = arena.iter().map(|(_, parameter)| parameter.value.copy().unwrap()).collect();
        // The values come only when they are asked for: whoever reads one before reads NaN.
        for (_, parameter) in arena.iter() {
            parameter.value.fill_assign(f64::NAN).unwrap();
        }
        let told = Rc::new(RefCell::new(Vec::new()));
        let hook = {
            let (arena, told) = (arena.clone(), Rc::clone(&told));
            BeforeUse::new(move |id| {
                arena.parameter(id).unwrap().value.copy_assign(&values[id.0]).unwrap();
                told.borrow_mut().push(id.0);
            })
        };
        let tape = Tape::new().with_before_use(Some(hook));
        let loss = loss(&tape, &arena, recompute).unwrap();
        assert!(loss.value().to_scalar().unwrap().is_finite(), "recompute {recompute}");
        tape.backward(&loss).unwrap();
        assert!(arena.gradients().to_f64_vec().unwrap().iter().all(|g| g.is_finite()), "recompute {recompute}");
        let mut told = told.borrow().clone();
        told.sort_unstable();
        told.dedup();
        assert_eq!(told, [0, 1, 2, 3]);
    }
}

#[test]
fn an_arena_for_ranks_is_padded_with_zeros_and_lends_the_masters_place() {
    let build = |keeps_master, length_multiple| {
        let mut builder = ArenaBuilder::default();
        let id = builder.add("table", [5, 4]);
        let layout = ArenaLayout { length_multiple, keeps_master, ..ArenaLayout::default() };
        (id, builder.build_with(DType::BF16, Device::Cpu, layout).unwrap())
    };
    let (id, lent) = build(false, 3 * ALIGNMENT);
    assert_eq!((lent.values().elements(), lent.gradients().elements()), (3 * ALIGNMENT, 3 * ALIGNMENT));
    assert!(!lent.keeps_master() && lent.master().dtype() == DType::F32);
    // Halfway between two bfloat16 numbers and a bit more: rounded up in the values, exact in the master.
    let exact = 1.0 + 1.0 / 256.0 + 1.0 / 65536.0;
    lent.master_of(id).unwrap().fill_assign(exact).unwrap();
    lent.publish().unwrap();
    assert_eq!(lent.values().to_f64_vec().unwrap()[..20], [1.0 + 1.0 / 128.0; 20]);
    assert_eq!(lent.master().to_f64_vec().unwrap()[..20], [exact; 20]);
    lent.zero_gradients().unwrap();
    assert!(lent.values().to_f64_vec().unwrap()[20..].iter().all(|&padding| padding == 0.0));
    let (_, kept) = build(true, 1);
    assert!(kept.keeps_master() && kept.master().elements() == ALIGNMENT);
    kept.zero_gradients().unwrap();
    let mut builder = ArenaBuilder::default();
    builder.add("table", [5, 4]);
    assert!(builder.build(DType::F64).keeps_master(), "values that are no bfloat16 are the master");
}
