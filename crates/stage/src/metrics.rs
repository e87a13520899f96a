//! Numbers of a training run, a step a line: `metrics.jsonl`, and TensorBoard events beside it.
//!
//! `metrics.jsonl` is the same for the same run; the event file carries wall times and is exempt.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use arete_records::hashes::STAGE_JSON;
use arete_records::{atomic, files, hex, redact};
use sha2::{Digest, Sha256};

use crate::{Error, tfevents};

/// Name of the file with one JSON object a step.
pub const FILE: &str = "metrics.jsonl";

/// Name of the TensorBoard event file. Its time stamp is fixed, so that a resumed run goes on in
/// the same file.
pub const EVENTS_FILE: &str = "events.out.tfevents.0000000000.arete";

/// Largest file of lines that is read: far more than a run of millions of steps writes.
const MAX_BYTES: u64 = 4 << 30;

/// Appends to `metrics.jsonl` and the event file of a directory.
#[derive(Debug)]
pub struct MetricsWriter {
    lines: File,
    events: File,
    dir: PathBuf,
}

impl MetricsWriter {
    /// Starts both files anew.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if they cannot be written.
    pub fn create(dir: impl AsRef<Path>) -> Result<Self, Error> {
        Self::open_at(dir, None)
    }

    /// Opens both files for going on after step `last_step` (none = anew): what was logged for
    /// later steps, and a line that a kill left incomplete, is removed.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the files cannot be read or written, [`Error::Records`] if a line that is to
    /// stay is not an object with a number `step`.
    pub fn open_at(dir: impl AsRef<Path>, last_step: Option<u64>) -> Result<Self, Error> {
        Self::open_within(dir, last_step.map(|step| (step, usize::MAX)))
    }

    /// Like [`MetricsWriter::open_at`]; of the last step itself, only so many lines stay.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn open_within(
        dir: impl AsRef<Path>,
        last_step: Option<(u64, usize)>,
    ) -> Result<Self, Error> {
        let dir = dir.as_ref().to_owned();
        fs_err::create_dir_all(&dir)?;
        let lines_path = dir.join(FILE);
        if last_step.is_some() {
            check_seal(&dir)?;
        }
        remove_seal(&dir)?; // it vouches for lines that may be cut now
        let events_path = dir.join(EVENTS_FILE);
        let (lines, events) = match last_step {
            Some((last_step, n_of_it)) => (
                kept_lines(&lines_path, last_step, n_of_it)?,
                tfevents::kept(&read_or_empty(&events_path)?, last_step, n_of_it),
            ),
            None => (Vec::new(), Vec::new()),
        };
        atomic::write(&lines_path, &lines)?;
        let events = if events.is_empty() { begun(&dir)? } else { events };
        atomic::write(&events_path, &events)?;
        let append = |path: &Path| {
            fs_err::OpenOptions::new().append(true).open(path).map(|file| file.into_parts().0)
        };
        Ok(Self { lines: append(&lines_path)?, events: append(&events_path)?, dir })
    }

    /// Logs the numbers of a step, in the order given. A number that is not finite becomes `null`
    /// in `metrics.jsonl`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a line cannot be appended.
    pub fn log(&mut self, step: u64, metrics: &[(&str, f64)]) -> Result<(), Error> {
        let mut line = Map::new();
        line.insert("step".to_owned(), step.into());
        line.extend(metrics.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())));
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        self.lines.write_all(text.as_bytes()).map_err(|error| self.named(error, FILE))?;
        let event = tfevents::scalars(now_s(), step, metrics);
        self.events.write_all(&event).map_err(|error| self.named(error, EVENTS_FILE))
    }

    /// Makes everything logged so far durable. Call it before a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the disk refuses.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.lines.sync_data().map_err(|error| self.named(error, FILE))?;
        self.events.sync_data().map_err(|error| self.named(error, EVENTS_FILE))?;
        write_seal(&self.dir)
    }

    fn named(&self, error: std::io::Error, file: &str) -> Error {
        let path = self.dir.join(file);
        std::io::Error::new(error.kind(), format!("{}: {error}", path.display())).into()
    }
}

/// The hidden file that vouches for the lines up to a checkpoint.
const SEAL: &str = ".metrics.jsonl.seal";

#[derive(serde::Serialize, serde::Deserialize)]
struct Seal {
    n_bytes: usize,
    sha256: String,
}

fn write_seal(dir: &Path) -> Result<(), Error> {
    let lines = read_or_empty(&dir.join(FILE))?;
    let seal = Seal { n_bytes: lines.len(), sha256: hex(&Sha256::digest(&lines)) };
    let json = serde_json::to_vec(&seal).expect("a number and a text serialise");
    Ok(atomic::write(dir.join(SEAL), &json)?)
}

fn remove_seal(dir: &Path) -> Result<(), Error> {
    match fs_err::remove_file(dir.join(SEAL)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Refuses lines that are not those that were logged before the last checkpoint: they cannot be made anew.
fn check_seal(dir: &Path) -> Result<(), Error> {
    let Ok(seal) = files::read_small(&dir.join(SEAL)) else { return Ok(()) };
    let path = dir.join(FILE);
    let lines = read_or_empty(&path)?;
    let found = serde_json::from_slice::<Seal>(&seal).ok();
    let expected = found
        .as_ref()
        .map_or_else(|| "a seal that can be read".to_owned(), |seal| seal.sha256.clone());
    let got = found
        .and_then(|seal| lines.get(..seal.n_bytes))
        .map_or_else(|| "fewer lines, or none".to_owned(), |lines| hex(&Sha256::digest(lines)));
    if got == expected {
        return Ok(());
    }
    let what =
        "lines before the last checkpoint: damaged; remove the directory to start anew; SHA-256"
            .to_owned();
    Err(arete_records::Error::Damaged { path, what, expected, got }.into())
}

/// What an event file begins with: its header, and the settings of the stage that works in the directory, if one does.
fn begun(dir: &Path) -> Result<Vec<u8>, Error> {
    let mut events = tfevents::header(now_s());
    let mark = read_or_empty(&dir.join(STAGE_JSON))?;
    let mark: Option<Value> = serde_json::from_slice(&mark).ok();
    if let Some(config) = mark.and_then(|mut mark| mark.get_mut("config").map(Value::take)) {
        let values = flat(&config);
        let mut table = "| setting | value |\n|---|---|\n".to_owned();
        for (name, value) in &values {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            table += &format!("| {name} | {} |\n", redact::redacted(&text).replace('|', "\\|"));
        }
        events.extend(tfevents::settings(now_s(), &table, &values));
    }
    Ok(events)
}

/// Nested settings as dotted names, in their order; what is not set is left out.
#[must_use]
pub fn flat(config: &Value) -> Vec<(String, Value)> {
    fn walk(prefix: &str, value: &Value, out: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                walk(&name, value, out);
            }),
            Value::Null => {}
            Value::Array(items) => {
                let word =
                    |item: &Value| item.as_str().map_or_else(|| item.to_string(), str::to_owned);
                let words: Vec<String> = items.iter().map(word).collect();
                out.push((prefix.to_owned(), words.join(", ").into()));
            }
            other => out.push((prefix.to_owned(), other.clone())),
        }
    }
    let mut out = Vec::new();
    let mut config = config.clone();
    redact::redact_json(&mut config);
    walk("", &config, &mut out);
    out
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

fn read_or_empty(path: &Path) -> Result<Vec<u8>, Error> {
    match files::read_capped(path, MAX_BYTES) {
        Err(arete_records::Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(Vec::new())
        }
        Err(arete_records::Error::Io(error)) => Err(error.into()),
        other => Ok(other?),
    }
}

/// The complete lines of steps up to `last_step`, at most `n_of_it` of the last.
fn kept_lines(path: &Path, last_step: u64, n_of_it: usize) -> Result<Vec<u8>, Error> {
    let bytes = read_or_empty(path)?;
    let mut kept = Vec::new();
    let mut left = n_of_it;
    for (index, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
        if !line.ends_with(b"\n") {
            break; // a kill cut it
        }
        let step = serde_json::from_slice::<Value>(line)
            .ok()
            .and_then(|line| line.get("step").and_then(Value::as_u64))
            .ok_or_else(|| arete_records::Error::Json {
                path: path.to_owned(),
                line: index + 1,
                expected: "an object with a number `step`".to_owned(),
                got: String::from_utf8_lossy(line).trim_end().to_owned(),
            })?;
        if step > last_step || (step == last_step && left == 0) {
            break;
        }
        left -= usize::from(step == last_step);
        kept.extend_from_slice(line);
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(dir: &Path) -> String {
        fs_err::read_to_string(dir.join(FILE)).unwrap()
    }

    #[test]
    fn a_line_a_step_in_the_order_given() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.log(1, &[("objective/kl", 0.5), ("loss/policy_avg", -0.125)]).unwrap();
        writer.log(2, &[("lr", 1e-5), ("bad", f64::NAN)]).unwrap();
        writer.flush().unwrap();
        assert_eq!(
            lines(dir.path()),
            "{\"step\":1,\"objective/kl\":0.5,\"loss/policy_avg\":-0.125}\n\
             {\"step\":2,\"lr\":0.00001,\"bad\":null}\n"
        );
    }

    #[test]
    fn a_resumed_run_ends_with_the_same_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = |writer: &mut MetricsWriter, step: u64| {
            writer.log(step, &[("loss", 1.0 / (step as f64 + 1.0))]).unwrap();
        };
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        (1..=5).for_each(|step| log(&mut writer, step));
        let uninterrupted = lines(dir.path());
        let events = fs_err::read(dir.path().join(EVENTS_FILE)).unwrap();

        let mut file = fs_err::OpenOptions::new().append(true).open(dir.path().join(FILE)).unwrap();
        file.write_all(b"{\"step\":6,\"lo").unwrap(); // killed within a line
        let mut writer = MetricsWriter::open_at(dir.path(), Some(3)).unwrap();
        let resumed_at = fs_err::read(dir.path().join(EVENTS_FILE)).unwrap();
        assert!(events.starts_with(&resumed_at) && resumed_at.len() < events.len());
        (4..=5).for_each(|step| log(&mut writer, step));
        assert_eq!(lines(dir.path()), uninterrupted);
        let resumed = fs_err::read(dir.path().join(EVENTS_FILE)).unwrap();
        assert_eq!(resumed.len(), events.len()); // only wall times differ
    }

    #[test]
    fn of_the_last_step_so_many_lines_stay() {
        let dir = tempfile::tempdir().unwrap();
        let log = |writer: &mut MetricsWriter, name| writer.log(2, &[(name, 1.0)]).unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.log(1, &[("loss", 1.0)]).unwrap();
        log(&mut writer, "loss");
        let (all, events) = (lines(dir.path()), dir.path().join(EVENTS_FILE));
        let n_events = fs_err::read(&events).unwrap().len();
        log(&mut writer, "probe");
        MetricsWriter::open_within(dir.path(), Some((2, 1))).unwrap();
        assert_eq!(lines(dir.path()), all);
        assert_eq!(fs_err::read(&events).unwrap().len(), n_events);
        MetricsWriter::open_within(dir.path(), Some((2, 0))).unwrap();
        assert_eq!(lines(dir.path()), "{\"step\":1,\"loss\":1.0}\n");
    }

    #[test]
    fn opening_anew_starts_empty_and_resuming_nothing_works() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::open_at(dir.path(), Some(7)).unwrap();
        writer.log(8, &[("loss", 1.0)]).unwrap();
        MetricsWriter::create(dir.path()).unwrap();
        assert_eq!(lines(dir.path()), "");
    }

    #[test]
    fn a_flipped_bit_before_a_checkpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.log(1, &[("loss", 0.5)]).unwrap();
        writer.flush().unwrap();
        writer.log(2, &[("loss", 0.25)]).unwrap();
        let path = dir.path().join(FILE);
        let sound = fs_err::read(&path).unwrap();
        let n_sealed = sound.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for at in 0..8 * n_sealed {
            let mut bytes = sound.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            fs_err::write(&path, bytes).unwrap();
            let error = MetricsWriter::open_at(dir.path(), Some(1)).unwrap_err().to_string();
            assert!(error.contains("metrics.jsonl") && error.contains("damaged"), "{error}");
        }
        fs_err::write(&path, &sound).unwrap();
        MetricsWriter::open_at(dir.path(), Some(1)).unwrap();
        assert_eq!(lines(dir.path()), "{\"step\":1,\"loss\":0.5}\n");
        MetricsWriter::open_at(dir.path(), Some(1)).unwrap();
    }

    #[test]
    fn the_event_file_begins_with_the_settings_of_the_stage() {
        let dir = tempfile::tempdir().unwrap();
        let nested = serde_json::json!({"rank": 4, "lora": {"targets": ["q", "v"]}, "url": "http://u:pw@h", "none": null});
        let expected = [
            ("rank", Value::from(4)),
            ("lora.targets", "q, v".into()),
            ("url", "http://***@h".into()),
        ];
        assert_eq!(flat(&nested), expected.map(|(name, value)| (name.to_owned(), value)));
        let mark = serde_json::json!({ "stage": "sft", "config": nested });
        fs_err::write(dir.path().join(STAGE_JSON), mark.to_string()).unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.log(1, &[("loss", 1.0)]).unwrap();
        let bytes = fs_err::read(dir.path().join(EVENTS_FILE)).unwrap();
        let has = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(has("_hparams_/session_start_info") && has("settings/text_summary"));
        assert!(has("| lora.targets | q, v |") && !has("pw@"));
        // A resumed run goes on behind them.
        MetricsWriter::open_at(dir.path(), Some(0)).unwrap();
        let resumed = fs_err::read(dir.path().join(EVENTS_FILE)).unwrap();
        assert!(bytes.starts_with(&resumed) && resumed.len() > 100);
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join(FILE), "{\"step\":1}\n{\"stop\":2}\n").unwrap();
        let error = MetricsWriter::open_at(dir.path(), Some(2)).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "metrics.jsonl:2: expected an object with a number `step`, got {\"stop\":2}"
            ),
            "{error}"
        );
    }
}
