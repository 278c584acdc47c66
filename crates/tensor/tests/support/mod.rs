//! A naive model of tensors: row-major values and index arithmetic that cannot be wrong, and random views of both.

#![allow(dead_code, reason = "each test file uses a part")]

use proptest::prelude::*;
use stickbreak_tensor::{DType, Tensor};

/// Values in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub struct Naive {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

/// Every index of a shape, in row-major order.
pub fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    for &size in shape {
        all = all.into_iter().flat_map(|index| (0..size).map(move |i| [&index[..], &[i]].concat())).collect();
    }
    all
}

impl Naive {
    /// A tensor given by a function of the index.
    pub fn from_fn(shape: &[usize], value: impl Fn(&[usize]) -> f64) -> Self {
        Self { shape: shape.to_vec(), values: indices(shape).iter().map(|index| value(index)).collect() }
    }

    pub fn at(&self, index: &[usize]) -> f64 {
        assert_eq!(index.len(), self.shape.len());
        self.values[index.iter().zip(&self.shape).fold(0, |flat, (&i, &size)| flat * size + i)]
    }

    /// The element that a broadcast to a larger shape shows at `index`.
    pub fn at_broadcast(&self, index: &[usize]) -> f64 {
        let own = &index[index.len() - self.shape.len()..];
        self.at(&own.iter().zip(&self.shape).map(|(&i, &size)| if size == 1 { 0 } else { i }).collect::<Vec<_>>())
    }

    pub fn broadcast_to(&self, shape: &[usize]) -> Self {
        Self::from_fn(shape, |index| self.at_broadcast(index))
    }
}

/// One random change of the view; numbers are taken modulo what the shape allows.
#[derive(Debug, Clone)]
pub enum Step {
    Permute(Vec<usize>),
    Transpose(usize, usize),
    Narrow(usize, usize, usize),
    Unsqueeze(usize),
    Broadcast(usize),
    Merge(usize),
    Flatten,
    Contiguous,
}

pub fn step() -> impl Strategy<Value = Step> {
    let n = || 0..1000usize;
    prop_oneof![
        prop::collection::vec(n(), 6).prop_map(Step::Permute),
        (n(), n()).prop_map(|(a, b)| Step::Transpose(a, b)),
        (n(), n(), n()).prop_map(|(d, start, len)| Step::Narrow(d, start, len)),
        n().prop_map(Step::Unsqueeze),
        (1..4usize).prop_map(Step::Broadcast),
        n().prop_map(Step::Merge),
        Just(Step::Flatten),
        Just(Step::Contiguous),
    ]
}

/// Sizes from 0 to 4, up to four dimensions; few of them empty.
pub fn shape() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1 => Just(0usize), 20 => 1..5usize], 0..5)
}

/// Makes the same change on both sides.
pub fn apply(step: &Step, tensor: &Tensor, naive: &Naive) -> (Tensor, Naive) {
    let (shape, rank) = (&naive.shape, naive.shape.len());
    match step {
        Step::Permute(keys) => {
            let mut order: Vec<usize> = (0..rank).collect();
            order.sort_by_key(|&d| keys[d % keys.len()]);
            (tensor.permute(&order).unwrap(), permuted(naive, &order))
        }
        Step::Transpose(a, b) if rank > 0 => {
            let mut order: Vec<usize> = (0..rank).collect();
            order.swap(a % rank, b % rank);
            (tensor.transpose(a % rank, b % rank).unwrap(), permuted(naive, &order))
        }
        Step::Narrow(dimension, start, len) if rank > 0 => {
            let d = dimension % rank;
            let start = start % (shape[d] + 1);
            let len = len % (shape[d] - start + 1);
            let mut to = shape.clone();
            to[d] = len;
            let shifted = |index: &[usize]| {
                let mut index = index.to_vec();
                index[d] += start;
                naive.at(&index)
            };
            (tensor.narrow(d, start, len).unwrap(), Naive::from_fn(&to, shifted))
        }
        Step::Unsqueeze(dimension) if rank < 6 => {
            let mut to = shape.clone();
            to.insert(dimension % (rank + 1), 1);
            (tensor.unsqueeze(dimension % (rank + 1)).unwrap(), Naive { shape: to, values: naive.values.clone() })
        }
        Step::Broadcast(times) if rank < 6 && naive.values.len() < 200 => {
            let mut to: Vec<usize> = shape.iter().map(|&size| if size == 1 { *times } else { size }).collect();
            to.insert(0, 2);
            (tensor.broadcast_to(to.clone()).unwrap(), naive.broadcast_to(&to))
        }
        Step::Merge(dimension) if rank > 1 => {
            let d = dimension % (rank - 1);
            let mut to = shape.clone();
            to[d] *= to.remove(d + 1);
            (tensor.reshape(to.clone()).unwrap(), Naive { shape: to, values: naive.values.clone() })
        }
        Step::Flatten => {
            let to = vec![naive.values.len()];
            (tensor.reshape(to.clone()).unwrap(), Naive { shape: to, values: naive.values.clone() })
        }
        Step::Contiguous => (tensor.contiguous().unwrap(), naive.clone()),
        _ => (tensor.clone(), naive.clone()),
    }
}

fn permuted(naive: &Naive, order: &[usize]) -> Naive {
    let to: Vec<usize> = order.iter().map(|&d| naive.shape[d]).collect();
    Naive::from_fn(&to, |index| {
        let mut from = vec![0; index.len()];
        order.iter().zip(index).for_each(|(&d, &i)| from[d] = i);
        naive.at(&from)
    })
}

/// A tensor of float64 and its model, with whole-number values, seen through a random chain of views.
pub fn viewed() -> impl Strategy<Value = (Tensor, Naive)> {
    (shape(), prop::collection::vec(step(), 0..6), any::<u64>()).prop_map(|(shape, steps, seed)| {
        let start = numbered(&shape, seed);
        let tensor = Tensor::from_vec(start.values.clone(), shape).unwrap();
        steps.iter().fold((tensor, start), |(tensor, naive), step| apply(step, &tensor, &naive))
    })
}

/// Small whole numbers, exact in every dtype and in sums.
pub fn numbered(shape: &[usize], seed: u64) -> Naive {
    let n: usize = shape.iter().product();
    let value = |i: usize| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed) >> 40) % 100;
    Naive { shape: shape.to_vec(), values: (0..n).map(|i| value(i) as f64).collect() }
}

/// The tensor laid out in memory in another order of dimensions, with gaps, somewhere inside a larger storage.
pub fn scattered(naive: &Naive, keys: &[usize], gap: usize) -> Tensor {
    let rank = naive.shape.len();
    let mut order: Vec<usize> = (0..rank).collect();
    order.sort_by_key(|&d| keys[d % keys.len()]);
    // Room for the permuted tensor, `gap` wider in each dimension.
    let room: Vec<usize> = order.iter().map(|&d| naive.shape[d] + gap).collect();
    let mut tensor = Tensor::full(-77.0, room, DType::F64);
    for (d, &from) in order.iter().enumerate() {
        tensor = tensor.narrow(d, gap / 2, naive.shape[from]).unwrap();
    }
    let mut inverse = vec![0; rank];
    order.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
    let tensor = tensor.permute(&inverse).unwrap();
    // 0 + 1 * x is exact, and -77 is overwritten by adding what is missing to it.
    let filled = Tensor::from_vec(naive.values.iter().map(|x| x + 77.0).collect(), naive.shape.clone()).unwrap();
    tensor.add_assign_scaled(1.0, &filled).unwrap();
    tensor
}

/// What a tensor holds, as the model sees it.
pub fn seen(tensor: &Tensor) -> Naive {
    Naive { shape: tensor.shape().to_vec(), values: tensor.to_f64_vec().unwrap() }
}
