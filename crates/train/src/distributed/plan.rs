//! `stickbreak doctor --plan CONFIG --gpus N`: what a run needs of each GPU's memory, and what to expect of its speed.

use super::cost::{Cluster, Work, efficiency, step_time};
use crate::config::{GradientType, RunConfig};
use crate::trainer::{NCCL_BYTES, gpu_memory_terms};
use anyhow::{Result, ensure};
use std::fmt::Write;
use stickbreak_model::count;

/// What the CUDA context takes beside the run's tensors, in bytes; measured on an H100: 574 and 604 MiB.
const CONTEXT_BYTES: u64 = 608 << 20;
/// Cards by the memory that they are sold with, and how many GiB of it a program sees (H100 SXM, H200).
const CARDS: [(&str, f64); 2] = [("80 GB", 78.0), ("141 GB", 139.0)];

/// The plan as text.
///
/// # Errors
/// If the cluster is none, or the batch cannot be shared by so many GPUs.
pub fn plan(config: &RunConfig, gpus: usize, cluster: &Cluster) -> Result<String> {
    ensure!(gpus > 0 && cluster.gpus_per_node > 0, "--gpus and --gpus-per-node must be at least 1");
    let within = |name: &str, value: f64, most: f64| {
        ensure!(value > 0.0 && value <= most, "{name} = {value} must be above 0 and at most {most}");
        Ok(())
    };
    within("--mfu", cluster.utilisation, 1.0)?;
    within("--network-gbit", cluster.network_bandwidth, f64::MAX)?;
    shared_by(config, gpus)?.check_ranks(gpus)?;
    let mut text = String::new();
    let parameters = count::parameters(&config.model).total as u64;
    let _ = writeln!(
        text,
        "{}: {:.2} billion parameters, {} tokens a step, {} GPUs a node\n",
        config.name,
        parameters as f64 / 1e9,
        config.train.batch_tokens,
        cluster.gpus_per_node
    );
    let counts: Vec<usize> =
        std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < gpus).chain([gpus]).collect();
    // Counts below that the batch cannot be shared by are left out.
    let configs: Vec<(usize, RunConfig)> = counts
        .into_iter()
        .filter_map(|n| Some((n, shared_by(config, n).ok()?)))
        .filter(|(n, config)| config.check_ranks(*n).is_ok())
        .collect();
    memory_table(&mut text, &configs, parameters);
    speed_table(&mut text, &configs, parameters, cluster);
    Ok(text)
}

/// The config with a micro-batch that is not larger than what each GPU has.
fn shared_by(config: &RunConfig, gpus: usize) -> Result<RunConfig> {
    let mut config = config.clone();
    let sequences = config.sequences_per_rank(gpus);
    ensure!(
        sequences > 0,
        "the {} sequences of a step (train.batch_tokens = {}, train.sequence_length = {}) are fewer than {gpus} GPUs",
        config.sequences_per_step(),
        config.train.batch_tokens,
        config.train.sequence_length
    );
    config.train.micro_batch = config.train.micro_batch.map(|micro| micro.min(sequences));
    Ok(config)
}

fn memory_table(text: &mut String, configs: &[(usize, RunConfig)], parameters: u64) {
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let _ = writeln!(text, "Memory of each GPU in GiB: estimated, exact for weights, gradients and optimizer");
    let _ = writeln!(
        text,
        "{:>5}  {:>9}  {:>9}  {:>12}  {:>9}  {:>11}  {:>9}  {:>6}  {:>7}  fits",
        "GPUs", "micro", "weights", "fp32 master", "gradients", "activations", "attention", "other", "total"
    );
    let _ = writeln!(text, "{:>5}  {:>9}  {:>9}  {:>12}", "", "batch", "bf16", "and moments");
    for (ranks, config) in configs {
        let terms = gpu_memory_terms(config, *ranks);
        let total: u64 = terms.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let total = total + CONTEXT_BYTES;
        let of = |names: &[&str]| -> u64 {
            terms.iter().filter(|(name, _)| names.contains(name)).map(|(_, bytes)| bytes).sum()
        };
        let copies = 2 * parameters;
        let optimizer = of(&["weights"]) - copies + of(&["optimizer moments"]);
        let gradients = of(&["gradients of weights"]);
        let activations = of(&["activations", "gradients of activations"]);
        let attention = of(&["state of the attention"]);
        let other = total - copies - optimizer - gradients - activations - attention;
        let fits: Vec<_> = CARDS.iter().filter(|(_, usable)| gib(total) < *usable).map(|(name, _)| *name).collect();
        let _ = writeln!(
            text,
            "{ranks:>5}  {:>9}  {:>9.2}  {:>12.2}  {:>9.2}  {:>11.2}  {:>9.2}  {:>6.2}  {:>7.2}  {}",
            config.micro_batch(*ranks),
            gib(copies),
            gib(optimizer),
            gib(gradients),
            gib(activations),
            gib(attention),
            gib(other),
            gib(total),
            if fits.is_empty() { "none".to_owned() } else { fits.join(", ") }
        );
    }
    let _ = writeln!(
        text,
        "other: output projection, workspaces, and, as measured, {:.2} GiB for NCCL and {:.2} GiB for the CUDA context\n",
        gib(NCCL_BYTES),
        gib(CONTEXT_BYTES)
    );
}

fn speed_table(text: &mut String, configs: &[(usize, RunConfig)], parameters: u64, cluster: &Cluster) {
    let _ = writeln!(text, "Speed: PREDICTED by a cost model, in ms a step; nothing in this table was measured");
    let _ = writeln!(
        text,
        "{:>5}  {:>8}  {:>9}  {:>7}  {:>14}  {:>10}  {:>7}  {:>6}  {:>9}  {:>12}  {:>12}",
        "GPUs",
        "compute",
        "optimizer",
        "slowed",
        "reduce-scatter",
        "all-gather",
        "exposed",
        "step",
        "tokens/s",
        "tokens/s/GPU",
        "of one GPU's"
    );
    for (ranks, config) in configs {
        let (micro, length) = (config.micro_batch(*ranks), config.train.sequence_length);
        let work = Work {
            parameters: parameters as f64,
            flops: count::training_flops(&config.model, micro * length, (micro * length * length) as f64),
            micro_batches: config.sequences_per_rank(*ranks) / micro,
            gradient_bytes: if config.distributed.gradient_dtype == GradientType::Bf16 { 2.0 } else { 4.0 },
            bucket_parameters: config.distributed.bucket_bytes(parameters as usize) as f64 / 4.0,
        };
        let time = step_time(cluster, &work, *ranks);
        let ms = |seconds: f64| seconds * 1e3;
        let rate = config.train.batch_tokens as f64 / time.total();
        let _ = writeln!(
            text,
            "{ranks:>5}  {:>8.1}  {:>9.1}  {:>7.1}  {:>14.1}  {:>10.1}  {:>7.1}  {:>6.0}  {:>9.0}  {:>12.0}  {:>11.1}%",
            ms(time.compute),
            ms(time.optimizer),
            ms(time.slowed),
            ms(time.reduce_scatter),
            ms(time.all_gather),
            ms(time.exposed),
            ms(time.total()),
            rate,
            rate / *ranks as f64,
            100.0 * efficiency(cluster, &work, *ranks)
        );
    }
    let _ = writeln!(text, "It can be above 100%, as each GPU updates a share of the parameters only. Predicted from:");
    for (name, value, source) in cluster.parameters() {
        let _ = writeln!(text, "  {name:<26} {value:<24} {}", source.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config() -> RunConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/3b.toml");
        RunConfig::load(&path, &[]).unwrap()
    }

    /// The cells of a table's row for so many GPUs.
    fn row(text: &str, table: &str, gpus: usize) -> Vec<f64> {
        let after = &text[text.find(table).unwrap()..];
        let line = after.lines().find(|line| line.split_whitespace().next() == Some(&gpus.to_string())).unwrap();
        line.split_whitespace().map_while(|cell| cell.trim_end_matches('%').parse().ok()).collect()
    }

    #[test]
    fn each_terms_share_is_what_zero_1_says() {
        let text = plan(&config(), 64, &Cluster::default()).unwrap();
        let billions = count::parameters(&config().model).total as f64 / (1u64 << 30) as f64;
        for gpus in [1, 2, 16, 64] {
            let cells = row(&text, "Memory", gpus);
            let near = |cell: usize, expected: f64| {
                assert!(
                    (cells[cell] - expected).abs() < 0.006,
                    "{gpus} GPUs, cell {cell}: {} not {expected}",
                    cells[cell]
                );
            };
            near(2, 2.0 * billions);
            near(3, 12.0 * billions / gpus as f64);
            near(4, 4.0 * billions);
            // Six terms, each rounded to a hundredth.
            let sum: f64 = cells[2..8].iter().sum();
            assert!((cells[8] - sum).abs() < 0.036, "{gpus} GPUs: {} is not {sum}", cells[8]);
        }
        assert!(text.contains("PREDICTED") && text.contains("assumed") && text.contains("measured"));
    }

    #[test]
    fn the_guides_tables_are_what_is_printed() {
        let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/distributed.md");
        let guide = std::fs::read_to_string(guide).unwrap();
        let text = plan(&config(), 1024, &Cluster::default()).unwrap();
        for gpus in [8, 64, 1024] {
            let terms = row(&text, "Memory", gpus)[2..9].iter().map(|cell| format!("{cell:.2}")).collect::<Vec<_>>();
            let line = format!("| {gpus} | {} |", terms.join(" | "));
            assert!(guide.contains(&line), "{line}");
            let cells = row(&text, "Speed", gpus);
            let line = format!("| {:.1} | {:.0} | {:.1}% |", cells[6], cells[7], cells[10]);
            assert!(guide.contains(&line), "{line}");
        }
    }

    #[test]
    fn the_rates_of_a_row_agree() {
        let config = config();
        let text = plan(&config, 48, &Cluster::default()).unwrap_err().to_string();
        assert!(text.contains("48"), "the batch cannot be shared by 48: {text}");
        let text = plan(&config, 1024, &Cluster::default()).unwrap();
        for gpus in [1, 8, 1024] {
            let cells = row(&text, "Speed", gpus);
            let sum = cells[1] + cells[2] + cells[3] + cells[6];
            assert!((sum - cells[7]).abs() < 1.0, "{cells:?}");
            let rate = config.train.batch_tokens as f64 / cells[7] * 1e3;
            assert!((rate / cells[8] - 1.0).abs() < 0.02 && (cells[8] / cells[9] / gpus as f64 - 1.0).abs() < 0.01);
        }
        assert_eq!(row(&text, "Speed", 1)[10], 100.0);
        assert!(row(&text, "Speed", 1024)[10] < row(&text, "Speed", 8)[10]);
    }

    #[test]
    fn a_plan_that_cannot_be_says_why() {
        let error = |gpus, cluster: Cluster| plan(&config(), gpus, &cluster).unwrap_err().to_string();
        assert!(error(4096, Cluster::default()).contains("1024 sequences"), "{}", error(4096, Cluster::default()));
        assert!(error(0, Cluster::default()).contains("at least 1"));
        assert!(error(8, Cluster { utilisation: 45.0, ..Cluster::default() }).contains("--mfu = 45"));
        assert!(error(8, Cluster { network_bandwidth: f64::NAN, ..Cluster::default() }).contains("--network-gbit"));
    }
}
