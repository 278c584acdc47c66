//! What a run measures: `metrics.jsonl`, one JSON object per line, and TensorBoard event files with the same numbers.
//!
//! ```json
//! {"kind":"train","step":120,"loss":2.31,"grad_norm":0.84,"learning_rate":0.0006,...}
//! {"kind":"valid","step":200,"loss":2.18,"perplexity":8.85,"bits_per_byte":1.02,"tokens":65536}
//! ```
//!
//! Numbers that are not finite are written as `null`, JSON having no other word for them, and read back as NaN.
//! Lines of a kind that this version does not know are kept in the file and skipped by the reader.

mod log;
mod record;
pub mod tensorboard;

pub use log::{METRICS_NAME, MetricsError, MetricsLog, RunMetrics, read_records};
pub use record::{
    AttentionHead, AttentionMap, AttentionMetrics, LengthMetrics, MemoryMetrics, PositionLoss, Record, SampleMetrics,
    TilesMetrics, TrainMetrics, ValidMetrics, mean_share,
};
