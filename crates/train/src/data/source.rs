//! Documents out of files: plain text, source trees, JSON lines (also compressed) and parquet.

use super::registry::{self, RegistryOptions};
use super::{DataError, Result, files};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use walkdir::WalkDir;

/// How far into a file a NUL is looked for.
const BINARY_PROBE_BYTES: u64 = 8 << 10;

/// Where documents come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    /// A file, or a folder that is walked.
    Path(PathBuf),
    /// The Rust sources in the user's cargo registry.
    CargoRegistry(RegistryOptions),
}

impl Input {
    /// A path, or the special name `cargo-registry` (a folder of that name is written `./cargo-registry`).
    pub fn parse(text: &str) -> Self {
        match text {
            "cargo-registry" => Self::CargoRegistry(RegistryOptions::default()),
            path => Self::Path(path.into()),
        }
    }
}

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Path relative to the input, with the line or row where the file has many documents. Decides the split.
    pub name: String,
    /// The text; not necessarily UTF-8.
    pub text: Vec<u8>,
}

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// The whole file is one document.
    Text,
    /// One JSON object a line.
    JsonLines,
    /// The same, compressed by zstd.
    JsonLinesZstd,
    /// A table with a `text` column.
    Parquet,
}

impl FileKind {
    fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        match () {
            _ if name.ends_with(".jsonl") => Self::JsonLines,
            _ if name.ends_with(".jsonl.zst") => Self::JsonLinesZstd,
            _ if name.ends_with(".parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// A file to read documents from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its name relative to the input.
    pub name: String,
    /// How it is read.
    pub kind: FileKind,
    /// Its size.
    pub bytes: u64,
}

/// The files of all inputs, in the order in which they are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileList {
    /// The files.
    pub files: Vec<InputFile>,
    /// Files of folders that were left out because they are binary.
    pub binary_files: u64,
}

/// Finds the files of the inputs. Folders are walked in the order of names; hidden files and folders, links to folders
/// and, with `extensions` not empty, files with other extensions are left out, as are binary files.
///
/// Fails when an input is missing, yields nothing, or is a binary file named on its own (unless it ends in `.txt`,
/// which says that NULs are text).
pub fn find_files(inputs: &[Input], extensions: &[String]) -> Result<FileList> {
    let mut list = FileList::default();
    for input in inputs {
        let before = list.files.len();
        match input {
            Input::CargoRegistry(options) => list.files.extend(registry::find_files(options)?),
            Input::Path(path) if path.is_dir() => walk(path, extensions, &mut list)?,
            Input::Path(path) => list.files.push(named_file(path)?),
        }
        if list.files.len() == before {
            return Err(DataError::Input(format!("{input:?}: no file to read (extensions: {extensions:?})")));
        }
    }
    Ok(list)
}

fn named_file(path: &Path) -> Result<InputFile> {
    let file = input_file(path, path.file_name().unwrap_or_default().as_ref())?;
    let explicit_text = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("txt"));
    if file.kind == FileKind::Text && !explicit_text && is_binary(path)? {
        let reason = "looks binary (a NUL in its first 8 KiB); a name that ends in .txt makes it text";
        return Err(DataError::Input(format!("{}: {reason}", path.display())));
    }
    Ok(file)
}

fn walk(folder: &Path, extensions: &[String], list: &mut FileList) -> Result<()> {
    let visible =
        |entry: &walkdir::DirEntry| entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.');
    for entry in WalkDir::new(folder).sort_by_file_name().into_iter().filter_entry(visible) {
        let entry = entry.map_err(|error| DataError::Input(format!("{}: {error}", folder.display())))?;
        let path = entry.path();
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        let wanted = extensions.is_empty() || extensions.iter().any(|e| extension == e.trim_start_matches('.'));
        if !wanted || !path.is_file() {
            continue;
        }
        let file = input_file(path, path.strip_prefix(folder).unwrap_or(path))?;
        if file.kind == FileKind::Text && is_binary(path)? {
            list.binary_files += 1;
        } else {
            list.files.push(file);
        }
    }
    Ok(())
}

pub(crate) fn input_file(path: &Path, name: &Path) -> Result<InputFile> {
    let bytes = fs::metadata(path).map_err(DataError::io(path, "open"))?.len();
    let kind = FileKind::of(path);
    if kind == FileKind::Parquet && cfg!(not(feature = "parquet")) {
        let advice = "reading parquet needs the cargo feature `parquet`: build with `--features parquet`";
        return Err(DataError::Input(format!("{}: {advice}", path.display())));
    }
    Ok(InputFile { path: path.to_path_buf(), name: name.to_string_lossy().into_owned(), kind, bytes })
}

fn is_binary(path: &Path) -> Result<bool> {
    Ok(files::read_beginning(path, BINARY_PROBE_BYTES)?.contains(&0))
}

/// The documents of some files, in order. Empty ones are left out and counted.
pub struct Documents<'a> {
    files: VecDeque<&'a InputFile>,
    open: Option<Box<dyn Iterator<Item = Result<Document>> + Send + 'a>>,
    bytes_read: Arc<AtomicU64>,
    empty: u64,
}

impl<'a> Documents<'a> {
    /// Reads these files.
    pub fn new(files: &'a [InputFile]) -> Self {
        Self { files: files.iter().collect(), open: None, bytes_read: Arc::default(), empty: 0 }
    }

    /// Bytes of the files read so far (compressed ones as they are on disk).
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Empty documents met so far.
    pub fn empty_documents(&self) -> u64 {
        self.empty
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some(open) = &mut self.open else {
                match open_documents(self.files.pop_front()?, &self.bytes_read) {
                    Ok(documents) => self.open = Some(documents),
                    Err(error) => return Some(Err(error)),
                }
                continue;
            };
            match open.next() {
                Some(Ok(document)) if document.text.is_empty() => self.empty += 1,
                Some(item) => return Some(item),
                None => self.open = None,
            }
        }
    }
}

type DocumentIter<'a> = Box<dyn Iterator<Item = Result<Document>> + Send + 'a>;

fn open_documents<'a>(file: &'a InputFile, bytes_read: &Arc<AtomicU64>) -> Result<DocumentIter<'a>> {
    let open = || -> Result<Counting> {
        let inner = File::open(&file.path).map_err(DataError::io(&file.path, "open"))?;
        Ok(Counting { inner, bytes_read: bytes_read.clone() })
    };
    Ok(match file.kind {
        FileKind::Text => {
            let mut text = Vec::with_capacity(file.bytes as usize);
            open()?.read_to_end(&mut text).map_err(DataError::io(&file.path, "read"))?;
            Box::new(std::iter::once(Ok(Document { name: file.name.clone(), text })))
        }
        FileKind::JsonLines => Box::new(JsonLines::new(file, BufReader::with_capacity(1 << 20, open()?))),
        FileKind::JsonLinesZstd => {
            let decoder = zstd::Decoder::new(open()?).map_err(DataError::io(&file.path, "decompress"))?;
            Box::new(JsonLines::new(file, BufReader::with_capacity(1 << 20, decoder)))
        }
        FileKind::Parquet => {
            bytes_read.fetch_add(file.bytes, Ordering::Relaxed);
            parquet_documents(file)?
        }
    })
}

/// Counts what is read of a file, for the progress bar.
struct Counting {
    inner: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Counting {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes_read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Documents of a JSON lines file. A line ends at a byte 0x0A and nowhere else: within a line U+2028, U+0085, a carriage
/// return or NUL is content (or an error of the JSON).
struct JsonLines<'a, R> {
    file: &'a InputFile,
    reader: R,
    line: u64,
    failed: bool,
}

impl<'a, R: BufRead> JsonLines<'a, R> {
    fn new(file: &'a InputFile, reader: R) -> Self {
        Self { file, reader, line: 0, failed: false }
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let read = self.reader.read_until(b'\n', &mut bytes);
            if read.map_err(DataError::io(&self.file.path, "read"))? == 0 {
                return Ok(None);
            }
            self.line += 1;
            if !bytes.iter().all(u8::is_ascii_whitespace) {
                break;
            }
        }
        let Text(text) = serde_json::from_slice(&bytes).map_err(|error| {
            // serde_json calls every line the first.
            let reason = error.to_string().replace(" at line 1 column ", ", column ");
            DataError::JsonLine { path: self.file.path.clone(), line: self.line, reason }
        })?;
        Ok(Some(Document { name: format!("{}:{}", self.file.name, self.line), text }))
    }
}

impl<R: BufRead> Iterator for JsonLines<'_, R> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let item = self.next_document().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}

/// The `text` of a JSON object as bytes; other keys are skipped. Asking for bytes rather than a `String` makes
/// serde_json keep invalid UTF-8 as it is.
struct Text(Vec<u8>);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object {\"text\": ...}")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
                let mut text = None;
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "text" if text.is_some() => return Err(serde::de::Error::duplicate_field("text")),
                        "text" => text = Some(map.next_value::<StringBytes>()?.0),
                        _ => _ = map.next_value::<IgnoredAny>()?,
                    }
                }
                text.map(Text).ok_or_else(|| serde::de::Error::missing_field("text"))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

struct StringBytes(Vec<u8>);

impl<'de> Deserialize<'de> for StringBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = StringBytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string as `text`")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<StringBytes, E> {
                Ok(StringBytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

#[cfg(feature = "parquet")]
fn parquet_documents(file: &InputFile) -> Result<DocumentIter<'_>> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;
    use parquet::schema::types::Type;

    let bad = |reason: String| DataError::Input(format!("{}: {reason}", file.path.display()));
    let opened = File::open(&file.path).map_err(DataError::io(&file.path, "open"))?;
    let reader = SerializedFileReader::new(opened).map_err(|error| bad(error.to_string()))?;
    let schema = reader.metadata().file_metadata().schema().clone();
    let column = schema.get_fields().iter().find(|field| field.name() == "text").cloned();
    let column = column.ok_or_else(|| bad("it has no column `text`".into()))?;
    let projection = Type::group_type_builder(schema.name()).with_fields(vec![column]).build();
    let projection = projection.map_err(|error| bad(error.to_string()))?;
    // The iterator that owns its reader, so that it can outlive this function.
    let rows = parquet::record::reader::RowIter::from_file_into(Box::new(reader))
        .project(Some(projection))
        .map_err(|error| bad(error.to_string()))?;
    Ok(Box::new(rows.enumerate().map(move |(row, record)| {
        let bad = |reason: String| DataError::Input(format!("{}: row {row}: {reason}", file.path.display()));
        let record = record.map_err(|error| bad(error.to_string()))?;
        let text = match record.get_column_iter().next() {
            Some((_, Field::Str(text))) => text.clone().into_bytes(),
            Some((_, Field::Bytes(bytes))) => bytes.data().to_vec(),
            Some((_, Field::Null)) | None => Vec::new(),
            Some((_, other)) => return Err(bad(format!("`text` is {other}, not a string"))),
        };
        Ok(Document { name: format!("{}:{row}", file.name), text })
    })))
}

#[cfg(not(feature = "parquet"))]
fn parquet_documents(file: &InputFile) -> Result<DocumentIter<'_>> {
    // `input_file` has refused it already.
    Err(DataError::Input(format!("{}: built without the cargo feature `parquet`", file.path.display())))
}
