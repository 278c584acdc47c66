//! How long a training step takes on many GPUs: a model of computing, communication, and what of it is hidden.
//!
//! ```text
//! computing      | forward | backward of the last micro-batch |AdamW|            | forward of the next step
//! communicating            | reduce-scatter, bucket by bucket |last|  all-gather, bucket by bucket |
//!                                                              ^^^^ exposed: the first-registered bucket is complete last
//! ```
//!
//! * `reduce-scatter, all-gather = buckets x latency + bytes (n - 1) / n / bandwidth`: every rank sends and receives all but
//!   its own part once; an all-reduce is both.
//! * Between nodes a ring leaves a node once and enters it once for every network card, so the bandwidth is that of all the
//!   node's cards together, and never more than that inside a node.
//! * What runs beside computing slows it, since it takes multiprocessors and memory bandwidth.
//!
//! It predicts. What its numbers are, and which of them were measured, is written at each in [`Cluster::default`].

/// A kind of machine, many of them, and the links between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cluster {
    /// GPUs of a node.
    pub gpus_per_node: usize,
    /// Dense bf16 flop/s of a GPU.
    pub peak_flops: f64,
    /// Share of the peak that one GPU's training step reaches.
    pub utilisation: f64,
    /// Bytes/s that AdamW reads and writes on a GPU.
    pub memory_bandwidth: f64,
    /// Bytes/s that a rank sends while it receives as much, inside a node.
    pub node_bandwidth: f64,
    /// Seconds of a collective of nothing inside a node.
    pub node_latency: f64,
    /// Bytes/s of the network card of each GPU, each way, as far as collectives reach it.
    pub network_bandwidth: f64,
    /// Seconds that each further node adds to a collective.
    pub hop_latency: f64,
    /// Share of computing's speed that is lost while a collective runs beside it.
    pub contention: f64,
}

/// A data sheet's figure, a measured one, or a guess: what is printed beside every parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From a vendor's data sheet.
    DataSheet,
    /// Measured, on two H100 80GB HBM3 with NVLink.
    Measured,
    /// What makes the model agree with steps that were measured there.
    Fitted,
    /// Neither: a plausible value.
    Assumed,
}

impl Source {
    /// As a word.
    pub fn name(self) -> &'static str {
        match self {
            Source::DataSheet => "data sheet",
            Source::Measured => "measured",
            Source::Fitted => "fitted",
            Source::Assumed => "assumed",
        }
    }
}

impl Default for Cluster {
    /// Nodes of 8 H100 with a 400 Gbit/s card for each.
    fn default() -> Self {
        Self {
            gpus_per_node: 8,
            // Data sheet: H100 SXM and H200.
            peak_flops: 989e12,
            // Measured: 1.34 billion parameters, 4 x 4096 tokens, one GPU: 57.5% of the peak in steps of 264.7 ms, AdamW's
            // 14.7 ms included. (360 million, 16 x 2048: 52%.)
            utilisation: 0.61,
            // Measured: AdamW on 359.8 million parameters takes 3.97 ms.
            memory_bandwidth: 2.72e12,
            // Measured: NCCL 2.28 on two GPUs, without multicast; the line closest to all of `PASSES` in the tests below.
            node_bandwidth: 287e9,
            node_latency: 57e-6,
            // Assumed: 85% of 400 Gbit/s.
            network_bandwidth: 0.85 * 400e9 / 8.0,
            // Assumed.
            hop_latency: 10e-6,
            // Fitted: what `STEPS` in the tests below lose. That is a lot: a product of 120 blocks for 132 multiprocessors
            // takes twice as long while a collective has some of them.
            contention: 0.75,
        }
    }
}

impl Cluster {
    /// Every parameter with its unit and where it comes from.
    pub fn parameters(&self) -> Vec<(&'static str, String, Source)> {
        vec![
            ("GPUs of a node", self.gpus_per_node.to_string(), Source::Assumed),
            ("peak of a GPU", format!("{:.0} TFLOP/s in bf16", self.peak_flops / 1e12), Source::DataSheet),
            ("reached by one GPU", format!("{:.0}% of it", 100.0 * self.utilisation), Source::Measured),
            ("memory, as AdamW uses it", format!("{:.2} TB/s", self.memory_bandwidth / 1e12), Source::Measured),
            ("links inside a node", format!("{:.0} GB/s", self.node_bandwidth / 1e9), Source::Measured),
            ("latency inside a node", format!("{:.0} us", self.node_latency * 1e6), Source::Measured),
            ("network of a GPU", format!("{:.1} GB/s", self.network_bandwidth / 1e9), Source::Assumed),
            ("latency of a further node", format!("{:.0} us", self.hop_latency * 1e6), Source::Assumed),
            ("computing lost beside it", format!("{:.0}%", 100.0 * self.contention), Source::Fitted),
        ]
    }

    /// Bytes/s of a collective over so many ranks, as a rank sends them.
    pub fn bandwidth(&self, ranks: usize) -> f64 {
        if ranks <= self.gpus_per_node {
            return self.node_bandwidth;
        }
        self.node_bandwidth.min(self.network_bandwidth * self.gpus_per_node as f64)
    }

    /// Seconds of a reduce-scatter or an all-gather of so many bytes (of the whole, not of a part).
    pub fn pass(&self, bytes: f64, ranks: usize) -> f64 {
        if ranks == 1 {
            return 0.0;
        }
        let nodes = ranks.div_ceil(self.gpus_per_node);
        let latency = self.node_latency + self.hop_latency * (nodes - 1) as f64;
        latency + bytes * (ranks - 1) as f64 / ranks as f64 / self.bandwidth(ranks)
    }
}

/// What a rank does in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Parameters of the model.
    pub parameters: f64,
    /// Floating-point operations of one micro-batch, forward and backward.
    pub flops: f64,
    /// Micro-batches of a rank's step.
    pub micro_batches: usize,
    /// Bytes of a gradient on the wire: 4 or 2.
    pub gradient_bytes: f64,
    /// Parameters of a bucket.
    pub bucket_parameters: f64,
}

/// Seconds of a step and what they go to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTime {
    /// Forward and backward of all micro-batches, undisturbed.
    pub compute: f64,
    /// AdamW on the rank's shard.
    pub optimizer: f64,
    /// Reduce-scatter, hidden or not.
    pub reduce_scatter: f64,
    /// All-gather, hidden or not.
    pub all_gather: f64,
    /// Communication that computing waits for.
    pub exposed: f64,
    /// What computing loses to communication that runs beside it.
    pub slowed: f64,
}

impl StepTime {
    /// Seconds of the step.
    pub fn total(&self) -> f64 {
        self.compute + self.optimizer + self.exposed + self.slowed
    }
}

/// Bytes that AdamW reads and writes for a parameter: gradient, master and two moments in float32, of which all but the
/// gradient are written again, and the bf16 copy.
const ADAMW_BYTES: f64 = 4.0 * 4.0 + 3.0 * 4.0 + 2.0;
/// Bytes of a weight as it is gathered.
const WEIGHT_BYTES: f64 = 2.0;
/// Forward's share of a step's operations; backward has the rest.
const FORWARD: f64 = 1.0 / 3.0;

/// Predicts a step.
pub fn step_time(cluster: &Cluster, work: &Work, ranks: usize) -> StepTime {
    let micro_batch = work.flops / (cluster.peak_flops * cluster.utilisation);
    let compute = micro_batch * work.micro_batches as f64;
    let (forward, backward) = (micro_batch * FORWARD, micro_batch * (1.0 - FORWARD));
    let optimizer = work.parameters * ADAMW_BYTES / ranks as f64 / cluster.memory_bandwidth;
    let buckets = (work.parameters / work.bucket_parameters).ceil().max(1.0);
    // All buckets but one run beside computing as far as that lasts; one is complete, or needed, when nothing runs.
    let beside = |bytes: f64, computing: f64| {
        let one = cluster.pass(bytes * work.parameters / buckets, ranks);
        let hidden = ((buckets - 1.0) * one).min(computing);
        (buckets * one, hidden, buckets * one - hidden)
    };
    let (reduce_scatter, hidden_first, exposed_first) = beside(work.gradient_bytes, backward);
    let (all_gather, hidden_second, exposed_second) = beside(WEIGHT_BYTES, forward);
    // Norm, loss and token count: one small all-reduce.
    let agreed = 2.0 * cluster.pass(0.0, ranks);
    StepTime {
        compute,
        optimizer,
        reduce_scatter,
        all_gather,
        exposed: exposed_first + exposed_second + agreed,
        slowed: cluster.contention * (hidden_first + hidden_second),
    }
}

/// A rank's rate on so many ranks over that of one GPU with the same micro-batches.
pub fn efficiency(cluster: &Cluster, work: &Work, ranks: usize) -> f64 {
    step_time(cluster, work, 1).total() / step_time(cluster, work, ranks).total()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 360M parameters, 16 x 2048 tokens, attention included.
    const WORK: Work = Work {
        parameters: 3.6e8,
        flops: 32768.0 * 2.5e9,
        micro_batches: 1,
        gradient_bytes: 4.0,
        bucket_parameters: 16.0 * 1048576.0,
    };

    /// Measured on two H100 with NVLink (NCCL 2.28): MiB, and milliseconds of a reduce-scatter and of an all-gather.
    const PASSES: [(f64, [f64; 2]); 4] =
        [(16.0, [0.090, 0.087]), (64.0, [0.168, 0.158]), (256.0, [0.574, 0.538]), (1024.0, [1.977, 1.856])];

    /// Measured there, with the portable attention kernels and a learning rate of 0: millions of parameters, MiB of a
    /// bucket, and milliseconds of a step on one GPU and on two, medians.
    const STEPS: [(f64, f64, f64, f64); 4] = [
        (359.84, 64.0, 160.1, 165.1),
        (359.84, 256.0, 160.1, 165.0),
        (1336.25, 64.0, 264.7, 273.1),
        (1336.25, 256.0, 264.7, 268.5),
    ];

    #[test]
    fn the_measured_collectives_are_reproduced() {
        let cluster = Cluster::default();
        for (mib, measured) in PASSES {
            let predicted = 1e3 * cluster.pass(mib * 1048576.0, 2);
            for measured in measured {
                assert!((predicted / measured - 1.0).abs() < 0.11, "{mib} MiB: {predicted} ms, measured {measured} ms");
            }
        }
    }

    #[test]
    fn the_measured_steps_of_two_gpus_follow_from_those_of_one() {
        for (millions, mib, one, two) in STEPS {
            let work = Work { parameters: 1e6 * millions, bucket_parameters: mib * 1048576.0 / 4.0, ..WORK };
            let optimizer = step_time(&Cluster::default(), &work, 1).optimizer;
            let utilisation = work.flops / Cluster::default().peak_flops / (1e-3 * one - optimizer);
            let cluster = Cluster { utilisation, ..Cluster::default() };
            let predicted = 1e3 * step_time(&cluster, &work, 2).total();
            assert!((predicted / two - 1.0).abs() < 0.021, "{millions}M, {mib} MiB: {predicted} ms, measured {two} ms");
            // Without what computing loses they would not.
            let predicted = 1e3 * step_time(&Cluster { contention: 0.0, ..cluster }, &work, 2).total();
            assert!(predicted / two - 1.0 < -0.03, "{millions}M, {mib} MiB: {predicted} ms, measured {two} ms");
        }
    }

    #[test]
    fn one_rank_communicates_nothing() {
        let time = step_time(&Cluster::default(), &WORK, 1);
        assert_eq!((time.reduce_scatter, time.all_gather, time.exposed, time.slowed), (0.0, 0.0, 0.0, 0.0));
        assert_eq!(time.total(), time.compute + time.optimizer);
        assert_eq!(efficiency(&Cluster::default(), &WORK, 1), 1.0);
    }

    #[test]
    fn a_pass_carries_all_but_the_own_part_over_the_slowest_link() {
        let cluster = Cluster { node_latency: 0.0, hop_latency: 0.0, node_bandwidth: 100.0, ..Cluster::default() };
        let cluster = Cluster { network_bandwidth: 5.0, gpus_per_node: 4, ..cluster };
        assert_eq!(cluster.pass(400.0, 4), 400.0 * 0.75 / 100.0);
        assert_eq!(cluster.pass(400.0, 8), 400.0 * 0.875 / 20.0, "the cards of 4 GPUs together");
        let wide = Cluster { network_bandwidth: 50.0, ..cluster };
        assert_eq!(wide.pass(400.0, 8), 400.0 * 0.875 / 100.0, "never faster than inside a node");
        let slow = Cluster { node_latency: 1.0, hop_latency: 0.5, ..wide };
        assert_eq!(slow.pass(0.0, 16), 1.0 + 3.0 * 0.5);
    }

    #[test]
    fn what_computing_hides_is_not_exposed_and_the_rest_is() {
        let quiet = Cluster { contention: 0.0, hop_latency: 0.0, node_latency: 0.0, ..Cluster::default() };
        let time = step_time(&quiet, &WORK, 8);
        let buckets = (WORK.parameters / WORK.bucket_parameters).ceil();
        let last = (time.reduce_scatter + time.all_gather) / buckets;
        assert!((time.exposed / last - 1.0).abs() < 1e-9, "one bucket of each: {} of {last}", time.exposed);
        // Links a thousand times slower: only a forward and a backward pass of it are hidden.
        let slow = Cluster { node_bandwidth: quiet.node_bandwidth / 1e3, ..quiet };
        let time = step_time(&slow, &WORK, 8);
        let expected = time.reduce_scatter + time.all_gather - time.compute;
        assert!((time.exposed / expected - 1.0).abs() < 1e-9);
        // Accumulation hides no more, but there is more to compute for the same communication.
        let more = Work { micro_batches: 8, ..WORK };
        assert!((step_time(&slow, &more, 8).exposed / time.exposed - 1.0).abs() < 1e-9);
        assert!(efficiency(&slow, &more, 8) > 4.0 * efficiency(&slow, &WORK, 8));
    }

    #[test]
    fn sharding_divides_the_optimizer_and_rounding_halves_the_gradients() {
        let cluster = Cluster { node_latency: 0.0, ..Cluster::default() };
        let (one, eight) = (step_time(&cluster, &WORK, 1), step_time(&cluster, &WORK, 8));
        assert!((one.optimizer / eight.optimizer - 8.0).abs() < 1e-9);
        let rounded = step_time(&cluster, &Work { gradient_bytes: 2.0, ..WORK }, 8);
        assert!((eight.reduce_scatter / rounded.reduce_scatter - 2.0).abs() < 1e-9);
        assert!((eight.reduce_scatter / eight.all_gather - 2.0).abs() < 1e-9);
    }

    #[test]
    fn every_parameter_is_printed_with_its_source() {
        let printed = Cluster::default().parameters();
        // Count the fields, so that a new one is not forgotten.
        assert_eq!(printed.len(), format!("{:?}", Cluster::default()).matches(": ").count());
        assert_eq!(printed.iter().filter(|(_, _, source)| *source == Source::Measured).count(), 4);
    }
}
