//! TensorBoard event files: scalars and text.
//!
//! An event file is a sequence of TFRecords: length (u64), masked CRC-32C of the length, data, masked CRC-32C of the
//! data, all little-endian. The data is a protobuf `Event`. Of protobuf three wire types are enough (varint, 64-bit,
//! length-delimited) and 32-bit for the scalar's float, so that they are written by hand here. Field numbers are those
//! of TensorFlow's `event.proto`, `summary.proto` and `tensor.proto`.
//!
//! Each start of a run begins a new file with a session-log event, by which TensorBoard drops the points that earlier
//! files have at or after its step: they are those that `metrics.jsonl` drops, too.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::record::Record;

/// One event file, open for appending.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new file `events.out.tfevents.<seconds>.<host>.<process>` in `folder`, which goes on after `step`
    /// (0 for a new run).
    ///
    /// # Errors
    /// The operating system's error.
    pub fn resume(folder: &Path, step: u64) -> io::Result<Self> {
        let base = format!("events.out.tfevents.{}.{}.{}", wall_time() as u64, host_name(), std::process::id());
        // TensorBoard reads files in the order of their names: one more in the same second sorts behind.
        let (path, file) = (0..1000)
            .map(|count| folder.join(if count == 0 { base.clone() } else { format!("{base}.{count:03}") }))
            .find_map(|path| match OpenOptions::new().append(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                result => Some(result.map(|file| (path, file))),
            })
            .unwrap_or_else(|| Err(io::Error::other(format!("a thousand files {base} exist"))))?;
        let mut writer = Self { path, file };
        writer.event(0, |event| event.bytes(3, b"brain.Event:2"))?;
        let start = Message::default().varint(1, 1); // SessionLog { status: START }
        writer.event(step + 1, |event| event.message(7, start))?;
        Ok(writer)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a point to the curve `tag`.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f32) -> io::Result<()> {
        let value = Message::default().bytes(1, tag.as_bytes()).float(2, value);
        self.event(step, |event| event.message(5, Message::default().message(1, value)))
    }

    /// Adds a text (Markdown) under `tag`.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> io::Result<()> {
        const DT_STRING: u64 = 7;
        const DATA_CLASS_TENSOR: u64 = 2;
        let one = Message::default().message(2, Message::default().varint(1, 1)); // Shape [1].
        let tensor = Message::default().varint(1, DT_STRING).message(2, one).bytes(8, text.as_bytes());
        let plugin = Message::default().bytes(1, b"text");
        let metadata = Message::default().message(1, plugin).varint(4, DATA_CLASS_TENSOR);
        let value = Message::default().bytes(1, tag.as_bytes()).message(8, tensor).message(9, metadata);
        self.event(step, |event| event.message(5, Message::default().message(1, value)))
    }

    /// Adds what a record has to show as curves or text; numbers that are not finite are left out.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        let step = record.step();
        let mut scalars = |values: &[(&str, f64)]| {
            let mut finite = values.iter().filter(|(_, value)| value.is_finite());
            finite.try_for_each(|(tag, value)| self.scalar(step, tag, *value as f32))
        };
        match record {
            Record::Train(train) => scalars(&[
                ("train/loss", train.loss),
                ("train/grad_norm", train.grad_norm),
                ("train/learning_rate", train.learning_rate),
                ("speed/tokens_per_second", train.tokens_per_second),
                ("speed/milliseconds", train.milliseconds),
                ("speed/device_milliseconds", train.device_milliseconds.unwrap_or(f64::NAN)),
                ("speed/host_milliseconds", train.host_milliseconds.unwrap_or(f64::NAN)),
                ("speed/exposed_milliseconds", train.exposed_milliseconds.unwrap_or(f64::NAN)),
                ("speed/mfu", train.mfu.unwrap_or(f64::NAN)),
                ("memory/peak_bytes", train.peak_memory_bytes.map_or(f64::NAN, |bytes| bytes as f64)),
                ("train/tiles_skipped", train.tiles_skipped.unwrap_or(f64::NAN)),
            ]),
            Record::Valid(valid) => scalars(&[
                ("valid/loss", valid.loss),
                ("valid/perplexity", valid.perplexity),
                ("valid/bits_per_byte", valid.bits_per_byte.unwrap_or(f64::NAN)),
            ]),
            Record::Length(length) => length
                .lengths
                .iter()
                .zip(&length.loss)
                .try_for_each(|(length, loss)| scalars(&[(&format!("length/loss_at_{length}"), *loss)])),
            Record::Attention(attention) => attention.heads.iter().try_for_each(|head| {
                let name = format!("layer_{}_head_{}", head.layer, head.head);
                scalars(&[
                    (&format!("attention_reach/{name}"), head.mean_reach),
                    (&format!("attention_tiles_visited/{name}"), head.tiles_visited),
                ])
            }),
            Record::Tiles(tiles) => {
                scalars(&[("valid/tiles_skipped", tiles.mean())])?;
                tiles.skipped.iter().enumerate().try_for_each(|(layer, heads)| {
                    heads.iter().enumerate().try_for_each(|(head, &share)| {
                        scalars(&[(&format!("attention_tiles_skipped/layer_{layer}_head_{head}"), share)])
                    })
                })
            }
            Record::Memory(memory) => scalars(&[("memory/peak_bytes", memory.peak_bytes as f64)]),
            Record::Sample(sample) => {
                // Indented by four spaces, text is shown as it is.
                let text = format!("{}{}", sample.prompt, sample.text).replace('\n', "\n    ");
                self.text(step, "sample", &format!("    {text}"))
            }
            Record::Unknown => Ok(()),
        }
    }

    /// Appends one event in one write, so that a killed process leaves whole records.
    fn event(&mut self, step: u64, fill: impl FnOnce(Message) -> Message) -> io::Result<()> {
        let event = fill(Message::default().double(1, wall_time()).varint(2, step));
        self.file.write_all(&tf_record(&event.0))
    }
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |duration| duration.as_secs_f64())
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    let plain: String = name.unwrap_or_default().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    if plain.is_empty() { "localhost".to_owned() } else { plain }
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn key(self, field: u64, wire_type: u64) -> Self {
        self.raw_varint(field << 3 | wire_type)
    }

    fn varint(self, field: u64, value: u64) -> Self {
        self.key(field, 0).raw_varint(value)
    }

    fn double(self, field: u64, value: f64) -> Self {
        self.key(field, 1).append(&value.to_le_bytes())
    }

    fn float(self, field: u64, value: f32) -> Self {
        self.key(field, 5).append(&value.to_le_bytes())
    }

    fn bytes(self, field: u64, value: &[u8]) -> Self {
        self.key(field, 2).raw_varint(value.len() as u64).append(value)
    }

    fn message(self, field: u64, value: Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn append(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

fn tf_record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

/// TFRecord's guard against checksums of data that contain checksums.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), a bit at a time: a record has a few dozen bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_values_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn varints_are_written_seven_bits_at_a_time() {
        assert_eq!(Message::default().varint(2, 300).0, [0x10, 0xac, 0x02]);
    }
}
