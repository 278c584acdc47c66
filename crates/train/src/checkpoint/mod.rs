//! Checkpoints that survive a crash, a full disk and a flipped bit.
//!
//! A checkpoint is a folder of plain files and a manifest with the length and the BLAKE3 checksum of each:
//!
//! ```text
//! checkpoints/
//!   step-00001000/  model.safetensors  optimizer.bin  state.json  manifest.json
//!   step-00001200/  ...
//!   .tmp-step-00001400-4711/     being written by process 4711; not a checkpoint yet
//! ```
//!
//! The order of a save is the whole trick, and each step relies on the one before it being on the disk:
//!
//! 1. the files are written into a temporary folder, hashed on the way and fsynced;
//! 2. `manifest.json` is written last and fsynced, then the folder itself (its list of names is data, too);
//! 3. everything is read back and compared with the manifest;
//! 4. one rename makes it a checkpoint: a reader sees all of it or nothing; the parent folder is fsynced;
//! 5. only now are old checkpoints deleted, as [`KeepPolicy`] says. A deletion starts with a rename, too, so that a
//!    half-deleted folder is not taken for a damaged checkpoint.
//!
//! Whatever happens between two of these steps, [`CheckpointStore::latest_valid`] finds the old checkpoint or the new
//! one, complete. The tests prove it by failing at every step and at many byte offsets ([`fault::FaultyDisk`]: a full
//! disk, a killed process, a power cut that loses whatever was not fsynced), and by really killing a saving process.
//!
//! One process saves to a store at a time; any number may read. Others can help it: they write files into the temporary
//! folder and check them ([`CheckpointStore::write_part`]), and the saving process takes their entries into the manifest
//! ([`CheckpointWriter::adopt`]).

mod disk;
mod error;
pub mod fault;
mod manifest;
mod store;
mod writer;

pub use disk::{Disk, RealDisk, write_atomically};
pub use error::CheckpointError;
pub use manifest::{FileEntry, MANIFEST_NAME, MANIFEST_VERSION, Manifest};
pub use store::{Checkpoint, CheckpointStore, KeepPolicy};
pub use writer::{CheckpointWriter, FileWriter};
