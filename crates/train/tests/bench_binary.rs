//! `stickbreak bench` on a trained run: what it measures, what it writes, what it refuses.

mod loop_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use loop_support::{Workspace, refused, stickbreak, succeed};
use serde_json::Value;

/// A run whose windows have several tiles of keys, and whose sticks are used up within one.
fn trained(workspace: &Workspace, name: &str, changes: &[&str]) -> std::path::PathBuf {
    let base = ["train.sequence_length=256", "train.batch_tokens=512", "train.steps=2", "evaluation.lengths=[]"];
    workspace.train(name, &[&base[..], &["model.early_exit_bits=12"], changes].concat())
}

fn bench(run: &Path, more: &[&str]) -> Command {
    let mut command = stickbreak();
    command.arg("bench").args(more).arg("--from").arg(run).args(["--device", "cpu", "--repeats", "1"]);
    command
}

/// The table, and the rows of the JSON file.
fn rows(workspace: &Workspace, command: &mut Command) -> (String, Vec<Value>) {
    let path = workspace.path("bench.json");
    let (table, _) = succeed(command.arg("--json").arg(&path));
    (table, serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["name"].as_str().unwrap()).collect()
}

#[test]
fn attention_is_measured_on_the_q_k_and_v_of_every_layer() {
    let workspace = Workspace::with_validation_bytes(3000);
    let run = trained(&workspace, "run", &[]);
    let (table, rows) = rows(&workspace, &mut bench(&run, &["attention", "--lengths", "96,400"]));
    let expected = [
        "run step 2, early exit 2^-12, forward",
        "run step 2, early exit 2^-12, backward",
        "run step 2, dense, forward",
        "run step 2, dense, backward",
        "softmax, forward",
        "softmax, backward",
    ];
    assert_eq!(names(&rows), [expected, expected].concat());
    let share = |row: usize| rows[row]["tiles_skipped"].as_f64().unwrap();
    assert_eq!((share(0), rows[0]["layers"].as_u64()), (0.0, Some(2)), "one tile, which is visited");
    // Of 5 query tiles of 96 rows each has to visit its own key tile, of 15.
    assert!(share(6) > 0.3 && share(6) <= 10.0 / 15.0, "{}", share(6));
    assert_eq!(rows[6]["tiles_skipped_by_layer"].as_array().unwrap().len(), 2);
    for row in &rows[6..8] {
        let apart: Vec<f64> = row["apart_from_dense"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        // Sticks like these leave a tile as good as nothing, so that what is skipped is hardly felt.
        assert!(apart.iter().all(|&apart| apart < 1e-3), "{apart:?}");
        assert_eq!(apart.len(), if row["name"].as_str().unwrap().ends_with("backward") { 3 } else { 1 });
    }
    assert!(rows[2].get("tiles_skipped").is_none() && rows.iter().all(|row| row["milliseconds"].as_f64() > Some(0.0)));
    assert!(rows[6]["shape"] == "2 x (B5 H2 L400 D16)", "{}", rows[6]["shape"]);
    let last: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
    assert_eq!((&last[..2], last.len(), last[7]), (&["400", "5"][..], 8, "-"), "{table}");
}

#[test]
fn decoding_is_measured_layer_by_layer_and_token_by_token() {
    let workspace = Workspace::with_validation_bytes(3000);
    let run = trained(&workspace, "run", &["model.num_kv_heads=1"]);
    let (table, rows) = rows(&workspace, &mut bench(&run, &["decode", "--lengths", "500"]));
    let expected = [
        "device copy",
        "run step 2, early exit 2^-12, attention",
        "run step 2, dense, attention",
        "run step 2, early exit 2^-12, prompt",
        "run step 2, early exit 2^-12, token",
        "run step 2, dense, prompt",
        "run step 2, dense, token",
    ];
    assert_eq!(names(&rows), expected);
    assert_eq!(rows[1]["shape"], "2 x (S1 H2/1 L500 D16)");
    // Keys and values of two layers, one head of 16 floats.
    assert_eq!(
        (rows[2]["cache_bytes"].as_u64(), rows[2]["cache_is_read_whole"].as_bool()),
        (Some(128_000), Some(true))
    );
    assert_eq!(rows[1]["cache_is_read_whole"], false);
    assert_eq!((&rows[3]["shape"], &rows[4]["shape"]), (&"498 tokens".into(), &"after 498 tokens".into()));
    assert!(table.contains("% of the copy rate") && table.contains("as if"), "{table}");
}

#[test]
fn a_training_step_is_measured_on_trained_weights_and_leaves_them() {
    let workspace = Workspace::with_validation_bytes(3000);
    let run = trained(&workspace, "run", &["train.micro_batch=1"]);
    let (_, rows) = rows(&workspace, &mut bench(&run, &["train"]));
    assert_eq!(names(&rows), ["run step 2, early exit 2^-12", "run step 2, dense"]);
    let loss = |row: &Value| row["loss"].as_f64().unwrap();
    // Untrained it would be the logarithm of 257; the same text for both, which differ by what 2^-12 of a stick can do.
    assert!(loss(&rows[0]) < 5.5 && (loss(&rows[0]) - loss(&rows[1])).abs() < 1e-2, "{rows:?}");
    assert!(rows[0]["tiles_skipped"].as_f64() > Some(0.0) && rows[1].get("tiles_skipped").is_none());
    assert_eq!(rows[0]["shape"], "2 x 256 tokens");
    // A checkpoint of the run is as good as the run.
    let (table, _) = succeed(&mut bench(&run.join("checkpoints/step-00000002"), &["train"]));
    assert!(table.contains("run step 2, early exit 2^-12"), "{table}");
    let dense = bench(&run, &["train", "--dense"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&dense.stdout).contains("early exit"));
    // A softmax run has one kind of step.
    let softmax = trained(&workspace, "softmax", &["model.attention=softmax-rope"]);
    let (table, _) = succeed(&mut bench(&softmax, &["train"]));
    assert!(table.contains("softmax step 2, softmax") && !table.contains("dense"), "{table}");
    for part in ["attention", "decode"] {
        let error = refused(&mut bench(&softmax, &[part]));
        assert!(error.contains("SoftmaxRope") && error.contains("softmax"), "{error}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let workspace = Workspace::with_validation_bytes(3000);
    let run = trained(&workspace, "run", &[]);
    let error = refused(&mut bench(&run, &["attention", "--lengths", "128,99999"]));
    assert!(error.contains("99999") && error.contains("3001"), "{error}");
    assert!(refused(&mut bench(&run, &["decode", "--lengths", "1"])).contains("has 1"));
    assert!(refused(&mut bench(&run, &["gemm"])).contains("--from"));
    assert!(
        refused(stickbreak().args(["bench", "attention", "--lengths", "64", "--device", "cpu"])).contains("--lengths")
    );
    assert!(refused(&mut bench(&workspace.path("nothing"), &["attention"])).contains("nothing"));
    // Options that would not be heard.
    for (options, named) in [
        (&["train", "--lengths", "64"][..], "--lengths"),
        (&["decode", "--peers"], "--peers"),
        (&["attention", "--dense"], "--dense"),
        (&["--dense"], "--dense"),
    ] {
        assert!(refused(&mut bench(&run, options)).contains(named), "{options:?}");
    }
    // Contexts that no machine has the memory for, or no length has the bits for.
    for (length, found) in [("2000000000", "GiB"), ("18446744073709551615", "2147483647")] {
        let error = refused(stickbreak().args(["bench", "decode", "--lengths", length, "--device", "cpu"]));
        assert!(error.contains(length) && error.contains(found), "{error}");
    }
    for repeats in ["0", "18446744073709551615"] {
        let output = stickbreak().args(["bench", "gemm", "--repeats", repeats]).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(repeats) && error.contains("--repeats"), "{error}");
    }
    // Nothing is measured that could not be kept; and what was measured before a failure is.
    let nowhere = workspace.path("no-folder/figures.json");
    let output = bench(&run, &["attention", "--lengths", "64"]).arg("--json").arg(&nowhere).output().unwrap();
    let (table, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && error.contains("no-folder/figures.json"), "{error}");
    assert!(!table.contains("forward"), "{table}");
    let figures = workspace.path("figures.json");
    refused(bench(&run, &["decode", "--lengths", "99999"]).arg("--json").arg(&figures));
    let rows: Vec<Value> = serde_json::from_slice(&fs::read(&figures).unwrap()).unwrap();
    assert_eq!(names(&rows), ["device copy"]);
    // Another text, and a text that is gone.
    let short = workspace.path("short.txt");
    fs::write(&short, "the cat sees the dog. ".repeat(20)).unwrap();
    let error = refused(bench(&run, &["attention"]).arg("--data").arg(&short));
    assert!(error.contains("441 tokens") && error.contains("512") && error.contains("--lengths"), "{error}");
    fs::write(&short, "the cat sees the dog. ".repeat(30)).unwrap();
    let (table, _) = succeed(bench(&run, &["attention"]).arg("--data").arg(&short));
    assert!(table.contains("has 661 tokens: no windows of [1024, 2048]"), "{table}");
    fs::remove_dir_all(workspace.path("data")).unwrap();
    let error = refused(&mut bench(&run, &["attention"]));
    assert!(error.contains("--data") && error.contains("data"), "{error}");
}

#[test]
fn a_run_that_holds_out_no_text_needs_another_one() {
    let workspace = Workspace::with_validation_bytes(3000);
    trained(&workspace, "prepared", &[]);
    let shard = workspace.path("data/train_000000.bin");
    let files = format!("data.token_files={{format='llmc',train=['{}'],end_of_text=256}}", shard.display());
    let run = trained(&workspace, "run", &[&files, "train.log_every=1"]);
    for part in ["attention", "train"] {
        let error = refused(&mut bench(&run, &[part]));
        assert!(error.contains("run holds out no text") && error.contains("--data"), "{error}");
    }
    let (table, _) = succeed(bench(&run, &["train"]).arg("--data").arg(workspace.path("data")));
    assert!(table.contains("dense"), "{table}");
    // Its report shows what was counted in training.
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("Share of the causal tiles skipped") && !page.contains("Skipped by each head"));
}

/// A `python3` that writes these lines, whatever it is told.
fn python(workspace: &Workspace, lines: &str) -> String {
    let folder = workspace.path("bin");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("python3");
    fs::write(&path, format!("#!/bin/sh\ncat > {}/request.json\ncat <<'END'\n{lines}\nEND\n", folder.display()))
        .unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
}

#[test]
fn peers_are_asked_for_our_shapes_and_stand_beside_ours() {
    let workspace = Workspace::with_validation_bytes(3000);
    let run = trained(&workspace, "run", &[]);
    let shape = r#"{"batch":10,"heads":2,"kv_heads":2,"length":200,"head_dim":16}"#;
    let time = |pass: &str, ms: f64| {
        format!(
            r#"{{"name":"softmax, cuDNN","pass":"{pass}","shape":{shape},"milliseconds":{ms},"fastest_milliseconds":0.5}}"#
        )
    };
    let lines = [time("forward", 1.0), time("backward", 3.0), r#"{"note":"no reference op"}"#.into()].join("\n");
    let path = python(&workspace, &lines);
    let mut command = bench(&run, &["attention", "--lengths", "200", "--peers"]);
    let (table, rows) = rows(&workspace, command.env("PATH", path));
    assert_eq!(names(&rows)[6..], ["softmax, cuDNN, forward", "softmax, cuDNN, backward"]);
    // Two layers.
    assert_eq!((rows[6]["milliseconds"].as_f64(), rows[7]["milliseconds"].as_f64()), (Some(2.0), Some(6.0)));
    assert!(table.contains("peers: no reference op"), "{table}");
    let last: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(last[6], "8.000", "cuDNN's both passes of both layers: {table}");
    let request: Value = serde_json::from_slice(&fs::read(workspace.path("bin/request.json")).unwrap()).unwrap();
    assert_eq!(request["shapes"], serde_json::from_str::<Value>(&format!("[{shape}]")).unwrap());
    assert_eq!((&request["device"], &request["repeats"]), (&"cpu".into(), &1.into()));

    let path = python(&workspace, r#"{"unavailable":"ModuleNotFoundError: No module named 'torch'"}"#);
    let mut command = bench(&run, &["attention", "--lengths", "200", "--peers"]);
    let (table, _) = succeed(command.env("PATH", path));
    assert!(table.contains("peers: none are timed, python3 cannot use torch: ModuleNotFoundError"), "{table}");
}
