//! Checkpoints under faults: at every step and many byte offsets of a save, what is found afterwards is the old
//! checkpoint or the new one, complete.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use stickbreak_train::checkpoint::fault::{Failure, FaultyDisk, When};
use stickbreak_train::checkpoint::{
    Checkpoint, CheckpointError, CheckpointStore, CheckpointWriter, Disk, FileEntry, KeepPolicy, MANIFEST_NAME,
    RealDisk,
};

const KEEP: KeepPolicy = KeepPolicy { last: 2, every: None };

/// Bytes that tell step and file apart.
fn contents(step: u64, name: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(format!("{step} {name}").as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

const FILES: [(&str, usize); 3] = [("model.safetensors", 700), ("empty.bin", 0), ("optimizer.bin", 1300)];

fn write_files(step: u64, writer: &mut CheckpointWriter<'_>) -> anyhow::Result<()> {
    for (name, length) in FILES {
        writer.file(name, |out| {
            for piece in contents(step, name, length).chunks(100) {
                out.write_all(piece)?;
            }
            Ok(())
        })?;
    }
    writer.json("state.json", &serde_json::json!({ "step": step }))
}

fn assert_complete(checkpoint: &Checkpoint) {
    let step = checkpoint.step();
    for (name, length) in FILES {
        assert_eq!(checkpoint.read(name).unwrap(), contents(step, name, length), "step {step}, {name}");
    }
    assert_eq!(checkpoint.json::<serde_json::Value>("state.json").unwrap()["step"], step);
}

fn save(store: &CheckpointStore, step: u64) -> Result<Checkpoint, CheckpointError> {
    store.save(step, |writer| write_files(step, writer))
}

/// A store that does not wait for the real disk.
fn open_fast(root: &Path) -> CheckpointStore {
    CheckpointStore::open_on(root, KEEP, Arc::new(FaultyDisk::new(When::Never, Failure::Killed))).unwrap()
}

fn latest(root: &Path) -> Option<u64> {
    let checkpoint = CheckpointStore::open(root, KEEP).unwrap().latest_valid().unwrap()?;
    assert_complete(&checkpoint);
    Some(checkpoint.step())
}

fn entries(root: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn saves_are_found_again_and_old_ones_go() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("run/checkpoints");
    let store = CheckpointStore::open(&root, KeepPolicy { last: 2, every: Some(4) }).unwrap();
    assert!(store.latest_valid().unwrap().is_none());
    for step in 1..=10 {
        let saved = save(&store, step).unwrap();
        assert_complete(&saved);
        assert_eq!(latest(&root), Some(step));
    }
    assert_eq!(store.steps().unwrap(), [4, 8, 9, 10]);
    assert_eq!(entries(&root), ["step-00000004", "step-00000008", "step-00000009", "step-00000010"]);
    let checkpoint = store.open_step(8).unwrap();
    assert_complete(&checkpoint);
    let names: Vec<&str> = checkpoint.files().map(|(name, _)| name).collect();
    assert_eq!(names, ["empty.bin", "model.safetensors", "optimizer.bin", "state.json"]);
    assert!(checkpoint.path("model.safetensors").unwrap().is_file());
    let error = checkpoint.read("weights.bin").unwrap_err().to_string();
    assert!(error.contains("weights.bin") && error.contains("model.safetensors"), "{error}");
    let error = store.open_step(7).unwrap_err().to_string();
    assert!(error.contains("step 7") && error.contains("[4, 8, 9, 10]"), "{error}");
}

#[test]
fn a_valid_step_is_not_overwritten_but_a_damaged_one_is() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    save(&store, 1).unwrap();
    save(&store, 2).unwrap();
    assert!(matches!(save(&store, 2), Err(CheckpointError::Exists { step: 2, .. })));
    fs::write(store.step_folder(2).join("optimizer.bin"), b"short").unwrap();
    assert_eq!(latest(folder.path()), Some(1));
    save(&store, 2).unwrap();
    assert_eq!(latest(folder.path()), Some(2));
    store.discard(2).unwrap();
    assert_eq!(entries(folder.path()), ["step-00000001"]);
}

#[test]
fn policies_and_names_that_could_lose_state_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for keep in [KeepPolicy { last: 1, every: None }, KeepPolicy { last: 2, every: Some(0) }] {
        assert!(matches!(CheckpointStore::open(folder.path(), keep), Err(CheckpointError::Policy { .. })));
    }
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    for name in ["", "../up", "a/b", ".hidden", "manifest.json", "a b", "nul\0"] {
        let error = store.save(1, |writer| writer.bytes(name, b"x")).unwrap_err();
        assert!(format!("{:#}", anyhow::Error::from(error)).contains(&format!("{name:?}")));
    }
    store.save(1, |writer| writer.bytes("a", b"x").and_then(|()| writer.bytes("a", b"y"))).unwrap_err();
    assert!(entries(folder.path()).is_empty());
}

#[test]
fn what_the_caller_fails_with_is_reported_and_nothing_changes() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    save(&store, 1).unwrap();
    let error = store.save(2, |writer| {
        write_files(2, writer)?;
        anyhow::bail!("rank 3 did not answer")
    });
    let error = format!("{:#}", anyhow::Error::from(error.unwrap_err()));
    assert!(error.contains("step 2") && error.contains("rank 3 did not answer"), "{error}");
    assert_eq!(entries(folder.path()), ["step-00000001"]);
}

/// A store with steps 1 and 2, then a save of step 3 that fails as told; returns what a fresh process finds.
fn save_with_fault(when: When, failure: Failure) -> (Result<u64, String>, Option<u64>, Vec<String>, Arc<FaultyDisk>) {
    let folder = tempfile::tempdir().unwrap();
    let store = open_fast(folder.path());
    save(&store, 1).unwrap();
    save(&store, 2).unwrap();
    let disk = Arc::new(FaultyDisk::new(when, failure));
    let faulty = CheckpointStore::open_on(folder.path(), KEEP, disk.clone()).unwrap();
    let saved = save(&faulty, 3).map(|saved| saved.step()).map_err(|error| format!("{:#}", anyhow::Error::from(error)));
    let before_reopening = entries(folder.path());
    let found = latest(folder.path());
    // The run goes on from whatever was found.
    let store = open_fast(folder.path());
    save(&store, 4).unwrap();
    assert_eq!(latest(folder.path()), Some(4));
    assert!(entries(folder.path()).iter().all(|name| name.starts_with("step-")), "leftovers are removed");
    (saved, found, before_reopening, disk)
}

/// Every point at which the save of [`save_with_fault`] can fail.
fn points() -> impl Iterator<Item = When> {
    let (saved, found, names, disk) = save_with_fault(When::Never, Failure::Killed);
    assert_eq!((saved, found), (Ok(3), Some(3)));
    assert_eq!(names, ["step-00000002", "step-00000003"]);
    let (operations, bytes) = (disk.operations(), disk.bytes());
    assert!(operations > 10 && bytes > 2000, "{operations} operations, {bytes} bytes");
    let offsets = (0..bytes).step_by(11).chain([699, 700, 701, 1999, 2000, 2001, bytes - 1]);
    (0..operations).flat_map(|number| [When::Before(number), When::After(number)]).chain(offsets.map(When::Bytes))
}

#[test]
fn killed_or_without_power_at_any_point_the_old_or_the_new_checkpoint_is_there() {
    for failure in [Failure::Killed, Failure::PowerCut] {
        let (mut old, mut new) = (0, 0);
        for when in points() {
            let (saved, found, _, disk) = save_with_fault(when, failure);
            assert!(disk.failed(), "{when:?}");
            match found {
                Some(2) => old += 1,
                Some(3) => new += 1,
                other => panic!("{failure:?} at {when:?}: found {other:?}"),
            }
            // A save that was reported as done survives everything.
            assert!(saved.is_err() || found == Some(3), "{failure:?} at {when:?}: reported, then lost");
        }
        assert!(old > 200 && new > 5, "{failure:?}: {old} times the old one, {new} times the new one");
    }
}

#[test]
fn a_full_disk_at_any_point_leaves_the_store_as_it_was() {
    for when in points() {
        let (saved, found, names, _) = save_with_fault(when, Failure::DiskFull);
        match saved {
            Ok(step) => {
                // Deleting old checkpoints failed, after the new one was safe.
                assert_eq!((step, found), (3, Some(3)), "{when:?}");
            }
            Err(message) => {
                assert!(message.contains("step 3") && message.contains("no space left"), "{when:?}: {message}");
                assert!(message.contains('/'), "no path in: {message}");
                let renamed = names.contains(&"step-00000003".to_owned());
                assert_eq!(found, Some(if renamed { 3 } else { 2 }), "{when:?}");
                // An operation may report an error although it took effect; only then may something be left.
                if matches!(when, When::Before(_) | When::Bytes(_)) {
                    assert_eq!(names, ["step-00000001", "step-00000002"], "{when:?}: {message}");
                }
            }
        }
    }
}

const PART: &str = "part-00001-of-00002.bin";

/// A save to which another process, here another store on the same disk, adds a file.
fn save_together(store: &CheckpointStore, helper: &CheckpointStore, step: u64) -> Result<Checkpoint, CheckpointError> {
    store.save(step, |writer| {
        write_files(step, writer)?;
        let part = |part: &mut CheckpointWriter<'_>| part.bytes(PART, &contents(step, PART, 900));
        let entries = helper.write_part(step, std::process::id(), part)?;
        entries.into_iter().try_for_each(|(name, entry)| writer.adopt(&name, entry))
    })
}

#[test]
fn a_checkpoint_of_two_writers_is_all_or_nothing_too() {
    let run = |when, failure| {
        let folder = tempfile::tempdir().unwrap();
        let (root, store) = (folder.path(), open_fast(folder.path()));
        save_together(&store, &store, 1).unwrap();
        save_together(&store, &store, 2).unwrap();
        let disk = Arc::new(FaultyDisk::new(when, failure));
        let faulty = CheckpointStore::open_on(root, KEEP, disk.clone()).unwrap();
        let saved = save_together(&faulty, &CheckpointStore::attach(root, KEEP, disk.clone()), 3).is_ok();
        let found = CheckpointStore::open(root, KEEP).unwrap().latest_valid().unwrap().unwrap();
        assert_complete(&found);
        assert_eq!(found.read(PART).unwrap(), contents(found.step(), PART, 900), "{failure:?} at {when:?}");
        (saved, found.step(), disk)
    };
    let (saved, found, disk) = run(When::Never, Failure::Killed);
    assert_eq!((saved, found), (true, 3));
    let offsets = (0..disk.bytes()).step_by(101).map(When::Bytes);
    let operations = (0..disk.operations()).flat_map(|number| [When::Before(number), When::After(number)]);
    for when in operations.chain(offsets) {
        for failure in [Failure::Killed, Failure::PowerCut, Failure::DiskFull] {
            let (saved, found, _) = run(when, failure);
            assert!(found == 3 || (found == 2 && !saved), "{failure:?} at {when:?}: {found}, reported: {saved}");
        }
    }
}

#[test]
fn what_another_process_says_it_wrote_has_to_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    let entry =
        |bytes: &[u8]| FileEntry { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() };
    let save = |name: &str, written: Option<&[u8]>, said: &[u8]| {
        let saved = store.save(1, |writer| {
            writer.bytes("own.bin", b"own")?;
            if let Some(written) = written {
                store.write_part(1, std::process::id(), |part| part.bytes(name, written))?;
            }
            writer.adopt(name, entry(said))
        });
        saved.map(drop).map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    };
    for (name, written, said, part) in [
        ("part.bin", None, &b"said"[..], "part.bin: missing"),
        ("part.bin", Some(&b"short"[..]), b"longer than that", "part.bin: 5 bytes long, but the manifest says 16"),
        ("own.bin", None, b"own", "\"own.bin\" is written twice"),
        ("../part.bin", None, b"said", "is not plain"),
        (MANIFEST_NAME, None, b"said", "is the store's own"),
    ] {
        let error = save(name, written, said).unwrap_err();
        assert!(error.contains(part), "{part} in {error}");
        assert_eq!(entries(folder.path()).len(), 0, "nothing half-written stays");
    }
    save("part.bin", Some(b"said"), b"said").unwrap();
    assert_eq!(store.latest_valid().unwrap().unwrap().read("part.bin").unwrap(), b"said");
    // A save that nobody has begun.
    let error = store.write_part(7, std::process::id(), |part| part.bytes("part.bin", b"x")).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(error)).contains("step-00000007"));
}

#[test]
fn the_first_save_of_a_run_fails_cleanly_too() {
    for failure in [Failure::Killed, Failure::PowerCut, Failure::DiskFull] {
        for number in 0..30 {
            let folder = tempfile::tempdir().unwrap();
            let disk = Arc::new(FaultyDisk::new(When::After(number), failure));
            let saved = save(&CheckpointStore::open_on(folder.path(), KEEP, disk).unwrap(), 1);
            assert!(saved.is_err() || latest(folder.path()) == Some(1));
        }
    }
}

#[test]
fn a_disk_that_writes_other_bytes_than_it_was_given_is_caught_before_old_checkpoints_go() {
    /// Flips the first byte of every write to one file.
    struct Liar;
    impl Disk for Liar {
        fn create_dir(&self, path: &Path) -> std::io::Result<()> {
            RealDisk.create_dir(path)
        }
        fn create_file(&self, path: &Path) -> std::io::Result<fs::File> {
            RealDisk.create_file(path)
        }
        fn write(&self, path: &Path, file: &mut fs::File, bytes: &[u8]) -> std::io::Result<usize> {
            let mut bytes = bytes.to_vec();
            if path.ends_with("optimizer.bin") {
                bytes[0] ^= 1;
            }
            RealDisk.write(path, file, &bytes)
        }
        fn sync_file(&self, path: &Path, file: &fs::File) -> std::io::Result<()> {
            RealDisk.sync_file(path, file)
        }
        fn sync_dir(&self, path: &Path) -> std::io::Result<()> {
            RealDisk.sync_dir(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
            RealDisk.rename(from, to)
        }
        fn remove_file(&self, path: &Path) -> std::io::Result<()> {
            RealDisk.remove_file(path)
        }
        fn remove_dir(&self, path: &Path) -> std::io::Result<()> {
            RealDisk.remove_dir(path)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    save(&store, 1).unwrap();
    save(&store, 2).unwrap();
    let error = save(&CheckpointStore::open_on(folder.path(), KEEP, Arc::new(Liar)).unwrap(), 3).unwrap_err();
    let error = format!("{:#}", anyhow::Error::from(error));
    assert!(error.contains("optimizer.bin") && error.contains("checksum"), "{error}");
    assert_eq!(entries(folder.path()), ["step-00000001", "step-00000002"]);
}

#[test]
fn every_file_truncated_or_flipped_is_refused_by_name_and_the_previous_checkpoint_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    save(&store, 1).unwrap();
    let good = save(&store, 2).unwrap();
    let mut names: Vec<(String, u64)> =
        good.files().map(|(name, FileEntry { bytes, .. })| (name.to_owned(), *bytes)).collect();
    names.push((MANIFEST_NAME.to_owned(), fs::metadata(good.folder().join(MANIFEST_NAME)).unwrap().len()));
    for (name, length) in names {
        let path = good.folder().join(&name);
        let bytes = fs::read(&path).unwrap();
        let refused = |what: &str| {
            let error = store.open_step(2).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{name} {what}: {error}");
            assert_eq!(latest(folder.path()), Some(1), "{name} {what}");
            error
        };
        for offset in (0..length as usize).step_by(if name == MANIFEST_NAME { 1 } else { 97 }) {
            for mask in [0x01, 0x80, 0x2d] {
                let mut flipped = bytes.clone();
                flipped[offset] ^= mask;
                fs::write(&path, &flipped).unwrap();
                refused(&format!("flipped at byte {offset}"));
            }
        }
        for shorter in (0..length as usize).step_by(if name == MANIFEST_NAME { 1 } else { 97 }) {
            fs::write(&path, &bytes[..shorter]).unwrap();
            let error = refused(&format!("cut to {shorter}"));
            assert!(error.contains(&shorter.to_string()), "{error}");
            assert!(name == MANIFEST_NAME || error.contains(&length.to_string()), "{error}");
        }
        fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
        refused("one byte longer");
        fs::remove_file(&path).unwrap();
        assert!(refused("deleted").contains("missing"));
        fs::write(&path, &bytes).unwrap();
        assert_eq!(latest(folder.path()), Some(2));
    }
}

#[test]
fn a_manifest_of_another_step_or_version_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    save(&store, 5).unwrap();
    fs::rename(store.step_folder(5), store.step_folder(6)).unwrap();
    let error = store.open_step(6).unwrap_err().to_string();
    assert!(error.contains("step 5") && error.contains('6'), "{error}");
    let newer = br#"{"format": "stickbreak-checkpoint", "version": 9, "shards": 4}"#;
    fs::write(store.step_folder(6).join(MANIFEST_NAME), newer).unwrap();
    let error = store.open_step(6).unwrap_err().to_string();
    assert!(error.contains("version is 9") && error.contains("reads 1"), "{error}");
    assert!(store.latest_valid().unwrap().is_none());
}

#[test]
fn damaged_checkpoints_do_not_count_as_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path(), KEEP).unwrap();
    save(&store, 1).unwrap();
    save(&store, 2).unwrap();
    fs::write(store.step_folder(2).join("optimizer.bin"), b"short").unwrap();
    save(&store, 3).unwrap();
    assert_eq!(store.steps().unwrap(), [1, 2, 3], "1 is what 3 can fall back to");
    save(&store, 4).unwrap();
    assert_eq!(store.steps().unwrap(), [3, 4]);
}

/// Set in the child of the next test: the store in which it saves until it is killed.
const CHILD_STORE: &str = "STICKBREAK_TEST_CHILD_STORE";
/// Large enough that a save takes a while.
const CHILD_BYTES: usize = 400_000;

#[test]
fn child_that_saves_until_it_is_killed() {
    let Some(root) = std::env::var_os(CHILD_STORE) else { return };
    let store = CheckpointStore::open(root, KEEP).unwrap();
    let first = store.latest_valid().unwrap().map_or(0, |checkpoint| checkpoint.step()) + 1;
    for step in first.. {
        let write = |writer: &mut CheckpointWriter<'_>| {
            for name in ["a.bin", "b.bin", "c.bin"] {
                writer.file(name, |out| {
                    for piece in contents(step, name, CHILD_BYTES).chunks(4096) {
                        out.write_all(piece)?;
                        out.flush()?; // To the file now: many more places to die at.
                    }
                    Ok(())
                })?;
            }
            Ok(())
        };
        store.save(step, write).unwrap();
        println!("saved {step}");
        std::io::stdout().flush().unwrap();
    }
}

#[test]
fn a_process_killed_while_it_saves_never_loses_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    let mut interrupted = 0;
    for round in 0..24_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_that_saves_until_it_is_killed", "--exact", "--nocapture"])
            .env(CHILD_STORE, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut note = |line: std::io::Result<String>| {
            // The test harness prints on the same pipe.
            let line = line.unwrap();
            let Some((_, step)) = line.split_once("saved ") else { return false };
            acknowledged = step.trim().parse().unwrap();
            true
        };
        // Past the first save of this child, then somewhere into a later one.
        while !note(lines.next().expect("the child must save at least once")) {}
        std::thread::sleep(Duration::from_micros(round * 2777 % 20_000));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        for line in lines {
            note(line);
        }
        interrupted += u32::from(entries(folder.path()).iter().any(|name| name.starts_with('.')));
        let found = CheckpointStore::open(folder.path(), KEEP).unwrap().latest_valid().unwrap().unwrap();
        assert!(
            found.step() == acknowledged || found.step() == acknowledged + 1,
            "round {round}: step {} found, step {acknowledged} was reported as saved",
            found.step()
        );
        for name in ["a.bin", "b.bin", "c.bin"] {
            assert_eq!(found.read(name).unwrap(), contents(found.step(), name, CHILD_BYTES));
        }
        assert!(entries(folder.path()).iter().all(|name| name.starts_with("step-")), "leftovers are removed");
    }
    println!("{interrupted} of 24 kills left an unfinished save or deletion behind");
    assert!(interrupted > 5, "only {interrupted} of 24 kills came in the middle of a save");
}
