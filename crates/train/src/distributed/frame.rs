//! The messages of the control plane and their form on the wire: `u32` header bytes, `u64` payload bytes (little-endian),
//! a header in JSON, a payload as it is.

use super::error::Failure;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::time::Duration;

/// What each side sends first, so that a stranger is known by its first bytes.
pub(super) const MAGIC: [u8; 8] = *b"stickbrk";
/// Changes with every change of the messages.
pub(super) const PROTOCOL: u32 = 1;

/// Longest header that is read; the longest that is written, a welcome to thousands of ranks, is far below.
const LARGEST_HEADER: u32 = 4 << 20;
/// Longest payload that is read: a whole model's gradients in tests on the CPU.
const LARGEST_PAYLOAD: u64 = 64 << 30;

/// What a process says of itself when it comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u32,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    pub(super) host: String,
    /// Unique among all GPUs; `None` on a CPU.
    pub(super) device: Option<String>,
    /// Name and value of everything that has to be the same for all.
    pub(super) identity: Vec<(String, String)>,
}

/// One message. To rank 0, or from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// To 0: the first message.
    Hello(Hello),
    /// From 0: everyone is there. The payload is what rank 0 has for all.
    Welcome { hosts: Vec<String> },
    /// From 0: there will be no run.
    Refused { why: String },
    /// To 0: this rank's part of exchange number `exchange`, in the payload, and how long the others may take.
    Share { exchange: u64, call: String, patience: Duration },
    /// From 0: the parts of all ranks, one behind the other in the payload.
    Shared { exchange: u64, lengths: Vec<u64> },
    /// To 0: this rank knows why the group is of no more use. From 0: all should know.
    Failed(Failure),
    /// To 0: a collective of the devices, of this number, does not end. Rank 0 knows who is behind.
    Hanging { number: u64, name: String, timeout: Duration },
    /// From 0: a rank said goodbye.
    Left { rank: usize },
    /// Both ways: still here, and has begun so many collectives of the devices.
    Alive { begun: u64 },
    /// Both ways: the connection will end, and that is in order.
    Goodbye,
}

/// Writes a message and flushes.
pub(super) fn write(to: &mut impl Write, message: &Message, payload: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(message).map_err(io::Error::other)?;
    let mut start = Vec::with_capacity(12 + header.len());
    start.extend((header.len() as u32).to_le_bytes());
    start.extend((payload.len() as u64).to_le_bytes());
    start.extend(header);
    to.write_all(&start)?;
    to.write_all(payload)?;
    to.flush()
}

/// Reads a message and its payload.
pub(super) fn read(from: &mut impl Read) -> io::Result<(Message, Vec<u8>)> {
    let (mut header_bytes, mut payload_bytes) = ([0; 4], [0; 8]);
    from.read_exact(&mut header_bytes)?;
    from.read_exact(&mut payload_bytes)?;
    let (header_bytes, payload_bytes) = (u32::from_le_bytes(header_bytes), u64::from_le_bytes(payload_bytes));
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    if header_bytes > LARGEST_HEADER || payload_bytes > LARGEST_PAYLOAD {
        return Err(bad(format!("a message of {header_bytes} + {payload_bytes} bytes")));
    }
    let header = read_bytes(from, u64::from(header_bytes))?;
    let message = serde_json::from_slice(&header).map_err(|error| bad(format!("an unknown message: {error}")))?;
    Ok((message, read_bytes(from, payload_bytes)?))
}

/// Grows with what arrives, so that a false length takes no memory.
fn read_bytes(from: &mut impl Read, bytes: u64) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    from.take(bytes).read_to_end(&mut data)?;
    if data.len() as u64 == bytes { Ok(data) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_the_wire_one_behind_the_other() {
        let lost = Failure::Lost { culprit: 3, reason: "died\n\"so\"".into() };
        let messages = [
            (Message::Alive { begun: 3 }, vec![]),
            (
                Message::Share { exchange: u64::MAX, call: "barrier \"end\"".into(), patience: Duration::MAX },
                vec![1, 2, 3],
            ),
            (Message::Failed(lost), vec![0; 100_000]),
            (Message::Goodbye, vec![]),
        ];
        let mut wire = Vec::new();
        for (message, payload) in &messages {
            write(&mut wire, message, payload).unwrap();
        }
        let mut rest = &wire[..];
        for expected in messages {
            assert_eq!(read(&mut rest).unwrap(), expected);
        }
        assert_eq!(read(&mut rest).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes: Vec<u8>) {
            let _ = read(&mut &bytes[..]);
        }

        #[test]
        fn a_message_cut_anywhere_is_an_error(cut in 0usize..60) {
            let mut wire = Vec::new();
            write(&mut wire, &Message::Left { rank: 1 }, &[7; 40]).unwrap();
            prop_assume!(cut < wire.len());
            prop_assert!(read(&mut &wire[..cut]).is_err());
        }
    }
}
