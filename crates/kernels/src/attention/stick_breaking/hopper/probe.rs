//! Microbenchmarks on a Hopper card, of the parts of the forward kernel ([`forward`](super::forward)) alone: what the copy
//! engine writes, what the products compute, and how fast each part runs. `docs/kernels-hopper.md` says what they decided.

use super::forward::{TILE_KEYS, Tuning};
use super::key_boxes;
use crate::cuda::{Arg, Boxes, DeviceRef, DeviceType, Kernel, Launch, Queue, Scratch, Source, TensorMap};
use crate::{KernelError, Result};

const OP: &str = "measuring a Hopper card";

/// One measurement.
#[derive(Debug, Clone, PartialEq)]
pub struct Rate {
    /// What ran.
    pub name: &'static str,
    /// Device time of the whole launch.
    pub milliseconds: f64,
    /// Clocks of one multiprocessor for one round.
    pub clocks_per_round: f64,
    /// Pairs of a query and a key, per multiprocessor and round; 0 for copies.
    pub pairs: usize,
    /// Multiplications and additions of tensor cores on the whole card.
    pub flops: f64,
    /// Bytes copied to shared memory on the whole card.
    pub bytes: f64,
}

/// The kernels for a head dim.
#[derive(Debug)]
pub struct Probe {
    queue: Queue,
    head_dim: usize,
    tuning: Tuning,
    source: Source,
}

/// What [`Probe::new`] compiles.
pub fn source(head_dim: usize, tuning: &Tuning) -> Source {
    let parts = &[
        include_str!("../../../../cuda/hopper.cuh"),
        include_str!("../../../../cuda/stick_breaking.cuh"),
        include_str!("../../../../cuda/stick_breaking_hopper.cuh"),
        include_str!("../../../../cuda/stick_breaking_hopper_forward.cu"),
        include_str!("../../../../cuda/hopper_probe.cu"),
    ];
    Source { file: "hopper_probe.cu", parts, defines: tuning.source(head_dim).defines }
}

impl Probe {
    /// For head dim 64 or 128.
    pub fn new(queue: &Queue, head_dim: usize, tuning: Tuning) -> Self {
        Self { queue: queue.clone(), head_dim, tuning, source: source(head_dim, &tuning) }
    }

    fn kernel(&self, entry: &'static str) -> Result<Kernel> {
        self.queue.gpu().kernel(&self.source, entry)
    }

    /// 64 columns of a tile of 128 keys as the copy engine leaves them in shared memory. `keys` is bf16 `[tokens, width]` at
    /// a stride; the tile starts at `row`, the columns at `column`.
    ///
    /// # Errors
    /// If the tile leaves the tensor, or the device fails.
    pub fn tile(
        &self,
        keys: DeviceRef<'_>,
        (tokens, width, stride): (usize, usize, usize),
        (row, column): (usize, usize),
    ) -> Result<Scratch> {
        if row + TILE_KEYS > tokens || column + 64 > width {
            let tile = format!("128 x 64 from {row}, {column}");
            return Err(KernelError::size(OP, "the tile", format!("inside {tokens} x {width}"), tile));
        }
        let map = TensorMap::swizzled(OP, "keys", keys, &key_boxes::<TILE_KEYS>(tokens, width, stride))?;
        let mut out = self.queue.scratch(DeviceType::Bf16, TILE_KEYS * 64)?;
        let arguments = [Arg::from(&mut out.as_mut()), Arg::from(row as i32), Arg::from(column as i32)];
        let launch = Launch { grid: [1, 1, 1], block: 128, shared: TILE_KEYS * 128 + 64 };
        self.queue.launch_with_maps(&self.kernel("probe_tile")?, launch, &[map], &arguments)?;
        Ok(out)
    }

    /// `q k^T` f32 `[64, 128]` and `weights v` f32 `[64, head_dim]` for bf16 q `[64, head_dim]`, k and v
    /// `[128, head_dim]`, weights `[64, 128]`.
    ///
    /// # Errors
    /// If a view has another length, or the device fails.
    pub fn products(
        &self,
        q: DeviceRef<'_>,
        k: DeviceRef<'_>,
        weights: DeviceRef<'_>,
        v: DeviceRef<'_>,
    ) -> Result<[Scratch; 2]> {
        let d = self.head_dim;
        let wanted = [("q", q, 64 * d), ("k", k, 128 * d), ("weights", weights, 64 * 128), ("v", v, 128 * d)];
        for (argument, view, len) in wanted {
            crate::cuda::check(OP, argument, (view.len(), view.dtype()), len, &[DeviceType::Bf16])?;
        }
        let mut scores = self.queue.scratch(DeviceType::F32, 64 * 128)?;
        let mut values = self.queue.scratch(DeviceType::F32, 64 * d)?;
        let (to_scores, to_values) = (Arg::from(&mut scores.as_mut()), Arg::from(&mut values.as_mut()));
        let arguments = [q.into(), k.into(), weights.into(), v.into(), to_scores, to_values];
        let launch = Launch { grid: [1, 1, 1], block: 128, shared: (64 + 256) * d * 2 };
        self.queue.launch(&self.kernel("probe_products")?, launch, &arguments)?;
        Ok([scores, values])
    }

    /// Runs each part for `rounds` rounds on every multiprocessor.
    ///
    /// # Errors
    /// If a kernel does not compile, or the device fails.
    pub fn rates(&self, rounds: usize) -> Result<Vec<Rate>> {
        let (d, warpgroups) = (self.head_dim, self.tuning.warpgroups);
        let blocks = self.queue.gpu().multiprocessors() as usize;
        let pairs = warpgroups * 64 * TILE_KEYS;
        // Of one product, on the whole card.
        let flops = |dim: usize| 2.0 * (pairs * dim * rounds * blocks) as f64;
        // With this factor the odds stay near 1, so that the fast path is taken.
        let factor = Arg::from(1e-3f32);
        let threads = 128 * warpgroups as u32;
        let tiles = 2 * (warpgroups * 64 + 256) * d;
        let mut rates = Vec::new();
        for (name, entry, shared, with_factor, flops, pairs) in [
            (
                "64 x 128 x 128 from shared memory",
                "probe_products_shared",
                warpgroups * 16384 + 32768,
                false,
                flops(128),
                pairs,
            ),
            ("64 x D x 128 from registers", "probe_products_registers", 256 * d, false, flops(d), pairs),
            ("scan", "probe_scan", 0, true, 0.0, pairs),
            ("scan and both products", "probe_loop", tiles, true, 2.0 * flops(d), pairs),
        ] {
            let kernel = self.kernel(entry)?;
            let launch = Launch { grid: [blocks as u32, 1, 1], block: threads, shared };
            let extra: &[Arg] = if with_factor { &[factor] } else { &[] };
            let (milliseconds, clocks) = self.time(&kernel, launch, &[], rounds, extra)?;
            rates.push(Rate { name, milliseconds, clocks_per_round: clocks / rounds as f64, pairs, flops, bytes: 0.0 });
        }
        // 16 MiB of keys, which stay in L2.
        let (tokens, width) = ((16 << 20) / (2 * d), d);
        let mut keys = self.queue.scratch(DeviceType::Bf16, tokens * width)?;
        self.queue.zero(&mut keys.as_mut())?;
        let plain = Boxes { sizes: [width, tokens], strides: [1, width], extents: [64, TILE_KEYS] };
        let maps = [
            (
                "copies, permuted",
                "probe_copies_permuted",
                TensorMap::swizzled(OP, "keys", keys.as_ref(), &key_boxes::<TILE_KEYS>(tokens, width, width))?,
            ),
            (
                "copies, rows as they come",
                "probe_copies_plain",
                TensorMap::swizzled(OP, "keys", keys.as_ref(), &plain)?,
            ),
        ];
        for (name, entry, map) in maps {
            let kernel = self.kernel(entry)?;
            let launch = Launch { grid: [blocks as u32, 1, 1], block: 128, shared: 4 * TILE_KEYS * 2 * d + 64 };
            let (milliseconds, clocks) = self.time(&kernel, launch, &[map], rounds, &[Arg::from(tokens as i32)])?;
            let bytes = (rounds * blocks * TILE_KEYS * 2 * d) as f64;
            rates.push(Rate {
                name,
                milliseconds,
                clocks_per_round: clocks / rounds as f64,
                pairs: 0,
                flops: 0.0,
                bytes,
            });
        }
        Ok(rates)
    }

    /// Milliseconds of the second of two launches, and the clocks that one block saw.
    fn time(
        &self,
        kernel: &Kernel,
        launch: Launch,
        maps: &[TensorMap<'_>],
        rounds: usize,
        extra: &[Arg],
    ) -> Result<(f64, f64)> {
        let mut clocks = self.queue.scratch(DeviceType::U32, 2)?;
        let mut sink = self.queue.scratch(DeviceType::F32, 1)?;
        let fixed = [Arg::from(&mut clocks.as_mut()), Arg::from(&mut sink.as_mut()), Arg::from(rounds as i32)];
        let arguments = [&fixed[..], extra].concat();
        self.queue.launch_with_maps(kernel, launch, maps, &arguments)?;
        let timer = self.queue.timer()?;
        self.queue.launch_with_maps(kernel, launch, maps, &arguments)?;
        let milliseconds = timer.milliseconds()?;
        let words = self.queue.download::<u32>(clocks.as_ref())?;
        Ok((milliseconds, f64::from(words[1]) * 2f64.powi(32) + f64::from(words[0])))
    }
}
