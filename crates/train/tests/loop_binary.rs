//! The binary from outside: signals, exit codes, messages, and every command on a finished run.

mod loop_support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use loop_support::{Running, Workspace, assert_same_run, damage, records, refused, steps, stickbreak, succeed};
use stickbreak_kernels::cuda::library::Library;
use stickbreak_model::{ModelConfig, Transformer};
use stickbreak_tensor::DType;
use stickbreak_train::metrics::Record;

/// Validations that take long enough to be hit by a signal.
const SLOW: [&str; 6] = [
    "train.steps=30",
    "checkpoint.every=10",
    "evaluation.every=10",
    "evaluation.tokens=20000",
    "sample.every=0",
    "checkpoint.keep_last=5",
];

fn resume_and_compare(workspace: &Workspace, name: &str) {
    succeed(&mut workspace.command(name, &SLOW));
    let run = workspace.path(name);
    assert_same_run(&workspace.path("whole"), &run, 30);
    assert_eq!(steps(&run, "train"), (1..=30).collect::<Vec<_>>());
    assert_eq!(steps(&run, "valid"), [0, 10, 20, 30]);
    assert!(run.join("report.html").exists());
}

#[test]
fn signals_in_every_phase_save_and_the_resumed_run_has_the_same_bits() {
    let workspace = Workspace::with_validation_bytes(20_000);
    succeed(&mut workspace.command("whole", &SLOW));

    // The log line after which a phase begins, and what must be there when the process is gone.
    for (name, signal, line, stopped, valid) in [
        ("in-first-evaluation", "INT", "memory: ", Some(0), &[][..]),
        ("in-step", "TERM", "step     13  loss", None, &[0, 10][..]),
        ("in-evaluation", "TERM", "step-00000020", Some(20), &[0, 10][..]),
        ("in-last-evaluation", "USR1", "step-00000030", Some(30), &[0, 10, 20][..]),
    ] {
        let mut running = Running::start(&mut workspace.command(name, &SLOW));
        running.wait_for(line);
        running.signal(signal);
        let (code, log) = running.end();
        assert_eq!(code, Some(0), "{name}: {log}");
        assert!(log.contains(&format!("stopped by SIG{signal} at step")), "{name}: {log}");
        let run = workspace.path(name);
        assert_eq!(steps(&run, "valid"), valid, "{name}");
        if let Some(step) = stopped {
            assert!(log.contains(&format!("at step {step};")), "{name}: {log}");
        }
        let taken = steps(&run, "train").len();
        assert!(taken == 0 || run.join(format!("checkpoints/step-{taken:08}")).exists(), "{name}: state is saved");
        resume_and_compare(&workspace, name);
    }

    // A save is short: a shell that does nothing but look sends the signal.
    let running = Running::start(&mut workspace.command("in-save", &SLOW));
    let script = format!(
        "while :; do for f in {}/checkpoints/.tmp-step-00000010-*; do [ -e \"$f\" ] && kill -TERM {} && exit 0; done; \
         [ -e {}/checkpoints/step-00000030 ] && exit 1; done",
        workspace.path("in-save").display(),
        running.child.id(),
        workspace.path("in-save").display(),
    );
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let (code, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("stopped by SIGTERM at step 10;"), "{log}");
    resume_and_compare(&workspace, "in-save");
}

#[test]
fn killed_right_after_a_checkpoint_no_step_is_there_twice_and_none_is_missing() {
    let workspace = Workspace::with_validation_bytes(20_000);
    succeed(&mut workspace.command("whole", &SLOW));
    // In the evaluation after a save, and some steps after a save.
    for (name, line) in [("after-save", "step-00000010"), ("later", "step     14  loss")] {
        let mut running = Running::start(&mut workspace.command(name, &SLOW));
        running.wait_for(line);
        running.signal("KILL");
        assert_eq!(running.end().0, None);
        resume_and_compare(&workspace, name);
    }
    // Killed again and again.
    for line in ["step      3  loss", "step     12  loss", "step-00000020", "step-00000030"] {
        let mut running = Running::start(&mut workspace.command("often", &SLOW));
        running.wait_for(line);
        running.signal("KILL");
        assert_eq!(running.end().0, None);
    }
    resume_and_compare(&workspace, "often");
}

#[test]
fn mistakes_in_the_configuration_end_with_a_message() {
    let workspace = Workspace::new();
    let toml = fs::read_to_string(workspace.path("run.toml")).unwrap();
    let file = |name: &str, text: &[u8]| {
        fs::write(workspace.path(name), text).unwrap();
        let mut command = stickbreak();
        command.arg("train").arg(workspace.path(name)).arg("--out").arg(workspace.path("run"));
        refused(&mut command)
    };
    let error = file("unknown.toml", toml.replace("warmup_steps", "warmup_step").as_bytes());
    assert!(error.contains("`warmup_step`; did you mean `warmup_steps`?") && error.contains("unknown.toml"), "{error}");
    let error = file("typed.toml", toml.replace("steps = 12", "steps = \"many\"").as_bytes());
    assert!(error.contains("steps") && error.contains("many") && error.contains("line"), "{error}");
    let error = file("broken.toml", b"[model\nname=");
    assert!(error.contains("broken.toml"), "{error}");
    let error = file("binary.toml", b"\xff\xfe\0");
    assert!(error.contains("binary.toml"), "{error}");
    let error = refused(stickbreak().args(["train", "no-such-file.toml"]));
    assert!(error.contains("no-such-file.toml"), "{error}");

    for (change, expected) in [
        ("nonsense", "key=value"),
        ("", "key=value"),
        ("=5", "unknown"),
        ("train.steps", "key=value"),
        ("train.steps=-1", "steps"),
        ("train.steps=1.5", "steps"),
        ("train.steps.deep=1", "not a table"),
        ("train=5", "train"),
        ("train.stepz=5", "did you mean `steps`"),
        ("model.attention=flash", "stick-breaking"),
        ("model.num_heads=3", "hidden_size"),
        ("model.hidden_size=0", "hidden_size"),
        ("train.sequence_length=0", "sequence_length"),
        ("train.batch_tokens=100", "batch_tokens"),
        ("optimizer.learning_rate=nan", "learning_rate"),
        ("optimizer.beta1=1.0", "beta1"),
        ("optimizer.epsilon=0.0", "epsilon"),
        ("sample.top_p=0.0", "top_p"),
        ("evaluation.tokens=0", "evaluation.tokens"),
        ("evaluation.lengths=[32, 0]", "evaluation.lengths"),
        ("checkpoint.keep_last=1", "keep_last"),
        ("data.tokenizer=no-such-tokenizer.json", "no-such-tokenizer.json"),
        ("data.inputs=[\"/no/such/folder\"]", "/no/such/folder"),
    ] {
        let error = refused(&mut workspace.command("run", &[change]));
        assert!(error.contains(expected), "{change}: {error}");
    }
    assert!(!workspace.path("run").join("metrics.jsonl").exists());
}

#[test]
fn data_that_does_not_fit_ends_with_a_message() {
    let workspace = Workspace::new();
    succeed(&mut workspace.command("run", &["train.steps=2"]));
    let error = refused(&mut workspace.command("small", &["model.vocab_size=100"]));
    assert!(error.contains("257 token ids") && error.contains("model.vocab_size is 100"), "{error}");
    let error = refused(&mut workspace.command("long", &["train.sequence_length=4096", "train.batch_tokens=8192"]));
    assert!(error.contains("4096"), "{error}");
    let text = "evaluation.lengths=[32, 100000]";
    let (_, log) = succeed(&mut workspace.command("curve", &["train.steps=2", text]));
    assert!(log.contains("100000") && log.contains("exceed"), "{log}");

    let shard = fs::read_dir(workspace.path("data"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_str().unwrap().contains("train") && path.extension().is_some())
        .unwrap();
    let name = shard.file_name().unwrap().to_str().unwrap();
    let good = fs::read(&shard).unwrap();
    let before = fs::read(workspace.path("run/metrics.jsonl")).unwrap();
    damage(&shard);
    assert!(refused(&mut workspace.command("run", &[])).contains(name));
    fs::write(&shard, &good[..good.len() - 2]).unwrap();
    assert!(refused(&mut workspace.command("run", &[])).contains(name));
    fs::remove_file(&shard).unwrap();
    assert!(refused(&mut workspace.command("run", &[])).contains(name));
    assert_eq!(fs::read(workspace.path("run/metrics.jsonl")).unwrap(), before);
    fs::write(&shard, good).unwrap();
    succeed(&mut workspace.command("run", &[]));
}

fn with_paths(command: &str, run: &Path, more: &[&str]) -> Command {
    let mut process = stickbreak();
    process.arg(command).arg(run).args(more);
    if ["eval", "generate"].contains(&command) {
        // Also where there is a GPU: results are compared with the training's, to the bit.
        process.args(["--device", "cpu"]);
    }
    process
}

#[test]
fn the_loss_falls_and_every_command_works_on_the_run() {
    let workspace = Workspace::new();
    succeed(&mut workspace.command("run", &["train.steps=80", "evaluation.every=0", "sample.every=0"]));
    let run = workspace.path("run");
    let mut train = Vec::new();
    let mut valid = Vec::new();
    for record in records(&run) {
        match record {
            Record::Train(metrics) => train.push(metrics.loss),
            Record::Valid(metrics) => valid.push((metrics.step, metrics.loss, metrics.bits_per_byte)),
            _ => {}
        }
    }
    assert!((train[0] - 257f64.ln()).abs() < 0.5, "the first loss is that of a guess: {}", train[0]);
    assert!(train[79] < 2.2, "{}", train[79]);
    let [(0, first, Some(_)), (80, last, Some(_))] = valid[..] else { panic!("{valid:?}") };
    assert!(last < 2.5 && last < first - 2.5, "{first} to {last}");

    let greedy = ["--prompt", "the cat ", "--tokens", "40", "--temperature", "0"];
    let (text, _) = succeed(&mut with_paths("generate", &run, &greedy));
    assert!(text.starts_with("the cat ") && text.len() > 20, "{text:?}");
    assert_eq!(text, succeed(with_paths("generate", &run, &greedy).args(["--seed", "9", "--threads", "2"])).0);
    let drawn = ["--prompt", "the cat ", "--tokens", "40", "--seed", "5"];
    let (text, _) = succeed(&mut with_paths("generate", &run, &drawn));
    assert_eq!(text, succeed(&mut with_paths("generate", &run, &drawn)).0);
    assert!(refused(&mut with_paths("generate", &run, &["--temperature=-1"])).contains("temperature"));
    assert!(refused(&mut with_paths("generate", &run, &["--top-p", "0"])).contains("top_p"));

    let data = workspace.path("held-out.txt");
    let data = data.to_str().unwrap();
    let json = workspace.path("eval.json");
    succeed(&mut with_paths("eval", &run, &["--data", data, "--tokens", "256", "--json", json.to_str().unwrap()]));
    let figures: serde_json::Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert!((figures["loss"].as_f64().unwrap() - last).abs() < 1e-6, "as in training: {figures} and {last}");
    let (table, _) = succeed(&mut with_paths("eval", &run, &["--data", data, "--lengths", "16,32,128"]));
    assert!(table.contains("trained length") && table.contains("128"), "{table}");
    let folder = workspace.path("data");
    succeed(&mut with_paths("eval", &run, &["--data", folder.to_str().unwrap()]));

    let empty = workspace.path("empty.txt");
    fs::write(&empty, "").unwrap();
    let empty = empty.to_str().unwrap();
    for more in [&["--length", "1"][..], &["--lengths", "1"][..], &[][..]] {
        let error = refused(with_paths("eval", &run, &["--data", empty]).args(more));
        assert!(error.contains("empty.txt"), "{error}");
    }
    assert!(refused(&mut with_paths("eval", &run, &["--data", "no-such.txt"])).contains("no-such.txt"));
    assert!(refused(&mut with_paths("eval", &run, &["--data", data, "--lengths", "99999"])).contains("99999"));
    assert!(refused(&mut with_paths("eval", &run, &["--data", data, "--length", "0"])).contains('0'));

    let (path, _) = succeed(&mut with_paths("report", &run, &[]));
    assert!(fs::read_to_string(path.trim()).unwrap().contains("<svg"));
    for command in ["report", "generate"] {
        assert!(refused(&mut with_paths(command, &workspace.path("nothing"), &[])).contains("nothing"));
    }
}

#[test]
fn a_model_with_fewer_ids_than_the_byte_tokenizer_is_refused() {
    let workspace = Workspace::new();
    let config: ModelConfig = serde_json::from_value(serde_json::json!({
        "vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 1,
    }))
    .unwrap();
    let model = Transformer::new(config.clone(), DType::F32).unwrap();
    model.initialise(1).unwrap();
    let folder = workspace.path("model");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), config.to_hugging_face(32).to_string()).unwrap();
    for file in model.weight_files(usize::MAX).unwrap() {
        fs::write(folder.join(file.name), file.bytes).unwrap();
    }
    let error = refused(&mut with_paths("generate", &folder, &["--prompt", "x"]));
    assert!(error.contains("100") && error.contains("257"), "{error}");
    let data = workspace.path("held-out.txt");
    let error = refused(&mut with_paths("eval", &folder, &["--data", data.to_str().unwrap()]));
    assert!(error.contains("100") && error.contains("257"), "{error}");
}

#[test]
fn a_device_or_dtype_that_cannot_be_used_is_an_error_and_never_replaced() {
    let workspace = Workspace::new();
    // No machine has so many cards; most have no driver, and are told which library was looked for, and where.
    let cuda = |command: &mut Command| {
        let error = refused(command.args(["--device", "cuda:4000"]));
        assert!(error.contains("cuda:4000") && !error.contains("panicked"), "{error}");
        if stickbreak_kernels::cuda::library::require(Library::Driver).is_err() {
            assert!(error.contains("libcuda.so.1") && error.contains("/usr/local/cuda"), "{error}");
        }
    };
    let config = workspace.path("run.toml");
    cuda(stickbreak().arg("train").arg(&config).arg("--out").arg(workspace.path("run")));
    cuda(stickbreak().args(["verify", "."]));
    cuda(stickbreak().args(["bench", "gemm"]));
    assert!(!workspace.path("run").exists());

    let error = refused(&mut workspace.command("run", &["dtype=bf16"]));
    assert!(error.contains("bf16") && error.contains("needs a GPU"), "{error}");
    let error = refused(stickbreak().args(["bench", "train", "--shape", "360m", "--device", "cpu"]));
    assert!(error.contains("--shape"), "{error}");
    let output = stickbreak().args(["train", "--device", "tpu"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("expected cpu, cuda or cuda:N"), "{error}");
}

#[test]
fn the_device_is_announced_and_the_resolved_dtype_stored() {
    let workspace = Workspace::new();
    let (_, log) = succeed(&mut workspace.command("run", &["train.steps=2", "dtype=auto"]));
    assert!(log.contains("device cpu, as asked") && log.contains("f32 on cpu") && log.contains("MFU n/a"), "{log}");
    let stored = fs::read_to_string(workspace.path("run/config.toml")).unwrap();
    assert!(stored.contains("dtype = \"f32\""), "{stored}");
    // What `auto` was resolved to is the same run.
    succeed(&mut workspace.command("run", &["train.steps=4", "dtype=f32"]));
    let error = refused(&mut workspace.command("run", &["train.steps=6", "dtype=f64"]));
    assert!(error.contains("dtype"), "{error}");
}

#[test]
fn a_profile_says_where_the_time_goes_and_changes_no_bit() {
    let workspace = Workspace::new();
    succeed(&mut workspace.command("plain", &[]));
    let (_, log) = succeed(workspace.command("profiled", &[]).arg("--profile"));
    assert_same_run(&workspace.path("plain"), &workspace.path("profiled"), 12);
    for phase in ["upload", "forward", "backward", "optimizer", "step", "100.0%"] {
        assert!(log.contains(phase), "{phase}: {log}");
    }
    let trace = fs::read(workspace.path("profiled/profile.json")).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |name: &str| events.iter().filter(|e| e["ph"] == "X" && e["name"] == name).count();
    assert_eq!((of("step"), of("forward"), of("optimizer")), (5, 10, 5), "five steps of two micro-batches");
    assert!(events.iter().filter(|e| e["ph"] == "X").all(|e| e["dur"].as_f64().unwrap() >= 0.0));

    // A run too short to be recorded says so.
    let (_, log) = succeed(workspace.command("short", &["train.steps=2"]).arg("--profile"));
    assert!(log.contains("not recorded") && !workspace.path("short/profile.json").exists(), "{log}");
}

#[test]
fn the_doctor_names_libraries_places_and_what_training_would_use() {
    let (text, _) = succeed(stickbreak().arg("doctor"));
    for what in ["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13", "kernel cache", "device cuda:0", "training"] {
        assert!(text.contains(what), "{what}: {text}");
    }
    assert!(text.contains("will run in"), "{text}");
}

#[test]
fn a_closed_output_ends_a_command_without_a_panic() {
    let mut command = stickbreak();
    let mut child = command.arg("doctor").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(141), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

/// Half of a text of this size takes far longer than a signal.
#[test]
fn a_signal_while_data_is_prepared_keeps_what_is_done_and_the_same_command_goes_on() {
    let workspace = Workspace::new();
    for part in 0..16 {
        let text = "All work and no play makes a dull text. ".repeat(50_000);
        fs::write(workspace.path(&format!("text/long-{part}.txt")), text).unwrap();
    }
    let mut running = Running::start(&mut workspace.command("run", &["train.steps=2"]));
    running.wait_for("preparing");
    running.signal("TERM");
    let (code, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("preparation stopped: SIGTERM; the same command continues it"), "{log}");
    let (_, log) = succeed(&mut workspace.command("run", &["train.steps=2"]));
    assert!(log.contains("2 steps"), "{log}");
}
