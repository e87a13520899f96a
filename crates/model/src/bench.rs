//! Speed tables: a figure beside what this machine's matrix products alone would give, measured in the same run.
//!
//! Absolute figures drift on shared machines; the ratio to a ceiling measured a moment earlier does not. Every stage's
//! `bench` command prints a [`Table`].

use std::io::Write;
use std::time::Instant;

use tch::{Kind, Tensor};

use crate::lora::Target;
use crate::{Decoder, Error};

/// Seconds per call of `work`, called once unmeasured and then for at least `at_least_s` seconds.
///
/// # Errors
///
/// What `work` returns.
pub fn time<E>(at_least_s: f64, mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    work()?;
    finish_queued();
    let (start, mut n) = (Instant::now(), 0);
    while start.elapsed().as_secs_f64() < at_least_s {
        work()?;
        finish_queued();
        n += 1;
    }
    Ok(start.elapsed().as_secs_f64() / f64::from(n))
}

/// Waits for what was queued on the GPUs; their calls return before they are done.
fn finish_queued() {
    for gpu in 0..tch::Cuda::device_count() {
        tch::Cuda::synchronize(gpu);
    }
}

/// Tokens a second that the forward pass's linear layers alone would give: dense, in the decoder's dtype, `rows` at a
/// time; with the product with the vocabulary if `with_vocabulary`.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch cannot allocate or multiply.
pub fn products_per_s(decoder: &Decoder, rows: usize, with_vocabulary: bool) -> Result<f64, Error> {
    let config = decoder.config();
    let size = |target: Target| target.size(config);
    let (q, k, gate) = (size(Target::Q), size(Target::K), size(Target::Gate));
    let (o, down) = (size(Target::O), size(Target::Down));
    let mut products = vec![
        (q.0 + 2 * k.0, q.1, config.num_layers),
        (o.0, o.1, config.num_layers),
        (2 * gate.0, gate.1, config.num_layers),
        (down.0, down.1, config.num_layers),
    ];
    if with_vocabulary {
        products.push((config.vocab_size, config.hidden_size, 1));
    }
    let mut seconds = 0.0;
    for (outputs, inputs, count) in products {
        let random = |rows: usize| -> Result<Tensor, Error> {
            let shape = [rows as i64, inputs as i64];
            Ok(Tensor::f_randn(shape, (Kind::Float, decoder.device()))?
                .f_to_kind(decoder.kind())?)
        };
        // Several matrices in turn, so that they come from memory as a model's do.
        let weights: Vec<Tensor> = (0..if count > 1 { 6 } else { 1 })
            .map(|_| random(outputs))
            .collect::<Result<_, _>>()?;
        let x = random(rows)?;
        let each = time(0.5, || -> Result<(), Error> {
            for weight in &weights {
                let _ = x.f_matmul(&weight.f_transpose(0, 1)?)?;
            }
            Ok(())
        })?;
        seconds += each / weights.len() as f64 * count as f64;
    }
    Ok(rows as f64 / seconds)
}

/// Bytes a second that libtorch's threads read from memory: the sum of an array far larger than any cache.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch cannot allocate it.
pub fn read_bytes_per_s() -> Result<f64, Error> {
    let n_values = 64i64 << 20;
    let array = Tensor::f_ones([n_values], (Kind::Float, tch::Device::Cpu))?;
    let seconds = time(0.5, || array.f_sum(Kind::Float).map(drop))?;
    Ok(4.0 * n_values as f64 / seconds)
}

/// Rows of work, figure and ceiling.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    work: String,
    figure: f64,
    unit: &'static str,
    ceiling: Option<f64>,
    note: String,
}

impl Table {
    /// A row. `ceiling` is in `unit` as well, measured in this run; `note` says what it is, or what the peers do.
    pub fn push(
        &mut self,
        work: impl Into<String>,
        figure: f64,
        unit: &'static str,
        ceiling: Option<f64>,
        note: impl Into<String>,
    ) {
        self.rows.push(Row { work: work.into(), figure, unit, ceiling, note: note.into() });
    }

    /// Writes the table in Markdown.
    ///
    /// # Errors
    ///
    /// What `out` returns.
    pub fn write_rows(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "| work | figure | ceiling | ratio | note |\n|---|---|---|---|---|")?;
        for Row { work, figure, unit, ceiling, note } in &self.rows {
            let (bound, ratio) = match ceiling {
                Some(bound) => (number(*bound), format!("{:.2}", figure / bound)),
                None => ("–".to_owned(), "–".to_owned()),
            };
            writeln!(out, "| {work}, {unit} | {} | {bound} | {ratio} | {note} |", number(*figure))?;
        }
        Ok(())
    }

    /// Writes the table in Markdown, dtype, threads and the process's peak memory below.
    ///
    /// # Errors
    ///
    /// What `out` returns.
    pub fn write(&self, out: &mut impl Write, decoder: &Decoder) -> std::io::Result<()> {
        self.write_rows(out)?;
        let peak = peak_rss_bytes().map_or("unknown".to_owned(), |bytes| {
            format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
        });
        writeln!(
            out,
            "\n{:?}, kernels {}, {} threads; peak memory {peak}",
            decoder.kind(),
            crate::kernels_name(),
            tch::get_num_threads(),
        )
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The most memory this process has had resident, where the system tells (Linux).
pub fn peak_rss_bytes() -> Option<u64> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(number(1234.5), "1234");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(1.234), "1.23");
    }

    #[test]
    fn memory_is_read() {
        assert!(peak_rss_bytes().is_none_or(|bytes| bytes > 1 << 20));
    }
}
