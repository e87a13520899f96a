//! Speed tables: a figure beside what this machine's matrix products alone would give, measured in the same run.
//!
//! Absolute figures drift on shared machines; the ratio to a ceiling measured a moment earlier does not. Every stage's
//! `bench` command prints a [`Table`].

use std::io::Write;
use std::time::Instant;

use tch::{Kind, Tensor};

use crate::adapter::lora::Target;
use crate::ops::{self, WeightRef};
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

/// Products alone, as [`products`] measures them.
#[derive(Clone, Copy, Debug)]
pub struct Products {
    /// Tokens a second through the faster of our products and libtorch's: the ceiling of a pass.
    pub tokens_per_s: f64,
    /// libtorch's time against ours: above 1 ours are the faster ones. 1 where libtorch's are ours as well (on GPUs).
    pub ours_against_libtorch: f64,
}

/// Tokens a second that the forward pass's linear layers alone would give; see [`products`].
///
/// # Errors
///
/// As [`products`].
pub fn products_per_s(decoder: &Decoder, rows: usize, with_vocabulary: bool) -> Result<f64, Error> {
    Ok(products(decoder, rows, with_vocabulary)?.tokens_per_s)
}

/// Measures the forward pass's linear layers alone: dense, in the decoder's dtype, `rows` at a time; with the product with the
/// vocabulary if `with_vocabulary`. Our products and libtorch's take turns.
///
/// # Errors
///
/// [`Error::Torch`] if libtorch cannot allocate or multiply.
pub fn products(decoder: &Decoder, rows: usize, with_vocabulary: bool) -> Result<Products, Error> {
    let config = decoder.config();
    let size = |target: Target| target.size(config);
    let (q, k, gate) = (size(Target::Q), size(Target::K), size(Target::Gate));
    let (o, down) = (size(Target::O), size(Target::Down));
    let mut shapes = vec![
        (q.0 + 2 * k.0, q.1, config.num_layers),
        (o.0, o.1, config.num_layers),
        (2 * gate.0, gate.1, config.num_layers),
        (down.0, down.1, config.num_layers),
    ];
    if with_vocabulary {
        shapes.push((config.vocab_size, config.hidden_size, 1));
    }
    let _guard = tch::no_grad_guard();
    let (mut ours, mut libtorchs, mut fastest) = (0.0, 0.0, 0.0);
    for (outputs, inputs, count) in shapes {
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
        let of_all = |product: &dyn Fn(&Tensor) -> Result<Tensor, Error>| {
            let seconds = time(0.25, || weights.iter().try_for_each(|w| product(w).map(drop)))?;
            Ok::<f64, Error>(seconds / weights.len() as f64 * count as f64)
        };
        let own = of_all(&|w| ops::linear(&x, &WeightRef::Dense(w), None, false))?;
        let other = of_all(&|w| Ok(x.f_matmul(&w.f_transpose(0, 1)?)?))?;
        (ours, libtorchs, fastest) = (ours + own, libtorchs + other, fastest + own.min(other));
    }
    Ok(Products { tokens_per_s: rows as f64 / fastest, ours_against_libtorch: libtorchs / ours })
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
