//! Attention over the cache in one launch, against softmax in f64.

use arete_model::cuda::plan::{self, AttentionAddresses, AttentionShape, Format};

use crate::machine::{Build, Job, output_of, run, run_in_all_orders};
use crate::numbers::{Random, encoded, epsilon, numbers};

/// A sequence's new rows and the runs of slots that hold its keys, theirs included.
pub(crate) struct Segment {
    rows: usize,
    spans: Vec<[i64; 2]>,
}

impl Segment {
    fn position(&self) -> usize {
        self.spans.iter().map(|span| span[1] as usize).sum::<usize>() - self.rows
    }
}

/// Segments over one cache, and what they attend with.
pub(crate) struct Case {
    shape: AttentionShape,
    segments: Vec<Segment>,
    slots: usize,
    pub(crate) q: Vec<f32>,
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl Case {
    pub(crate) fn new(
        shape: AttentionShape,
        segments: Vec<Segment>,
        format: Format,
        seed: u64,
    ) -> Self {
        let mut random = Random(seed);
        let ends = segments.iter().flat_map(|segment| &segment.spans).map(|span| span[0] + span[1]);
        let slots = ends.max().expect("a span") as usize + 1;
        let rows: usize = segments.iter().map(|segment| segment.rows).sum();
        let mut draw = |n: usize, size: f32| -> Vec<f32> {
            let values: Vec<f32> = (0..n).map(|_| random.number() * size).collect();
            numbers(&encoded(&values, format), format)
        };
        let size = shape.head_size as usize;
        let q = draw(rows * shape.heads as usize * size, 4.0);
        let keys = draw(slots * shape.kv_heads as usize * size, 2.0);
        let values = draw(slots * shape.kv_heads as usize * size, 1.0);
        Self { shape, segments, slots, q, keys, values }
    }

    fn rows(&self) -> usize {
        self.segments.iter().map(|segment| segment.rows).sum()
    }

    /// Slots no segment may read hold NaN: reading one would show.
    fn poison_unused(&mut self) {
        let width = (self.shape.kv_heads * self.shape.head_size) as usize;
        for slot in 0..self.slots {
            let used = self
                .segments
                .iter()
                .flat_map(|segment| &segment.spans)
                .any(|span| (span[0] as usize..(span[0] + span[1]) as usize).contains(&slot));
            if !used {
                self.keys[slot * width..(slot + 1) * width].fill(f32::NAN);
                self.values[slot * width..(slot + 1) * width].fill(f32::NAN);
            }
        }
    }

    /// Segments and spans as the decoder lists them.
    pub(crate) fn tables(&self) -> (Vec<[i64; 5]>, Vec<[i64; 2]>) {
        let (mut segments, mut spans) = (Vec::new(), Vec::new());
        let mut row = 0;
        for segment in &self.segments {
            let position = segment.position() as i64;
            let [rows, n_spans] = [segment.rows, segment.spans.len()].map(|n| n as i64);
            segments.push([row, rows, position, spans.len() as i64, n_spans]);
            spans.extend(&segment.spans);
            row += rows;
        }
        (segments, spans)
    }

    fn job(&self, format: Format) -> Job {
        let (segments, spans) = self.tables();
        let last = |segment: &[i64; 5]| (segment[2] + segment[1] - 1) as u32;
        let most = segments.iter().map(|segment| self.shape.most_splits(last(segment)));
        let splits = most.max().expect("a segment");
        let rows = self.rows() as u32;
        let scratch = plan::attention_scratch(self.shape, rows, splits);
        let bytes = |values: Vec<i64>| -> Vec<u8> {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        let q = encoded(&self.q, format);
        let buffers = vec![
            vec![0xaa; q.len()],
            q,
            encoded(&self.keys, format),
            encoded(&self.values, format),
            bytes(segments.concat()),
            bytes(spans.concat()),
            vec![0xff; scratch.partials as usize * 4],
            vec![0; scratch.arrivals as usize * 4],
        ];
        let at = AttentionAddresses {
            out: 1,
            q: 2,
            keys: 3,
            values: 4,
            segments: 5,
            spans: 6,
            partials: 7,
            arrivals: 8,
        };
        let n_segments = self.segments.len() as u32;
        let launch = plan::attention(&at, format, self.shape, rows, n_segments, splits);
        Job { launch, buffers }
    }

    pub(crate) fn assert_close(&self, name: &str, out: &[f32], format: Format) {
        for (at, (&got, expected)) in out.iter().zip(self.expected()).enumerate() {
            // Scores up to about 50 are rounded at 2^-24 of themselves, and so their weights; values are at most 1.
            let tolerance = epsilon(format) * expected.abs() + 2e-5;
            assert!(
                (f64::from(got) - expected).abs() <= tolerance,
                "{name}: element {at} is {got}, expected {expected}"
            );
        }
    }

    /// Softmax over the keys that a row sees, in f64.
    fn expected(&self) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_size, window } = self.shape;
        let [heads, kv_heads, size, window] =
            [heads, kv_heads, head_size, window].map(|n| n as usize);
        let mut out = Vec::new();
        let mut row = 0;
        for segment in &self.segments {
            let slots: Vec<usize> = segment
                .spans
                .iter()
                .flat_map(|span| span[0] as usize..(span[0] + span[1]) as usize)
                .collect();
            for within in 0..segment.rows {
                let last = segment.position() + within;
                let first = if window > 0 { (last + 1).saturating_sub(window) } else { 0 };
                let seen = &slots[first..=last];
                for head in 0..heads {
                    let q = &self.q[(row * heads + head) * size..][..size];
                    let at = |slot: usize| (slot * kv_heads + head * kv_heads / heads) * size;
                    let scores: Vec<f64> = seen
                        .iter()
                        .map(|&slot| {
                            let products = q.iter().zip(&self.keys[at(slot)..][..size]);
                            let dot: f64 =
                                products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                            dot / (size as f64).sqrt()
                        })
                        .collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> =
                        scores.iter().map(|score| (score - top).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for element in 0..size {
                        let values = seen.iter().map(|&slot| self.values[at(slot) + element]);
                        let sum: f64 =
                            values.zip(&weights).map(|(value, w)| f64::from(value) * w).sum();
                        out.push(sum / total);
                    }
                }
                row += 1;
            }
        }
        out
    }
}

fn one_row(spans: &[[i64; 2]]) -> Segment {
    Segment { rows: 1, spans: spans.to_vec() }
}

/// Rows of very different lengths: alone, on and beside the edges of splits, continuing one prefix, over several runs, some of
/// them of several rows.
pub(crate) fn segments() -> Vec<Segment> {
    vec![
        one_row(&[[700, 1]]),
        one_row(&[[0, 127]]),
        one_row(&[[130, 128]]),
        one_row(&[[0, 129]]),
        Segment { rows: 3, spans: vec![[0, 120], [300, 11]] },
        one_row(&[[0, 120], [320, 200], [270, 2]]),
        one_row(&[[0, 120], [320, 200], [530, 61]]),
    ]
}

pub(crate) const SHAPES: [AttentionShape; 9] = [
    // Mistral-7B's groups and heads, with a window and without
    AttentionShape { heads: 8, kv_heads: 2, head_size: 128, window: 0 },
    AttentionShape { heads: 4, kv_heads: 1, head_size: 128, window: 130 },
    // SmolLM2: groups of three
    AttentionShape { heads: 9, kv_heads: 3, head_size: 64, window: 0 },
    // every head its own keys; a window shorter than a split
    AttentionShape { heads: 3, kv_heads: 3, head_size: 64, window: 7 },
    AttentionShape { heads: 4, kv_heads: 2, head_size: 64, window: 0 },
    // one key/value head for more query heads than a block takes
    AttentionShape { heads: 12, kv_heads: 1, head_size: 32, window: 0 },
    // the shortest head, one that is no power of two, the longest
    AttentionShape { heads: 2, kv_heads: 2, head_size: 8, window: 0 },
    AttentionShape { heads: 5, kv_heads: 1, head_size: 80, window: 100 },
    AttentionShape { heads: 8, kv_heads: 1, head_size: 256, window: 0 },
];

fn check(build: Build, shapes: &[AttentionShape], all_orders: bool) {
    for (i, &shape) in shapes.iter().enumerate() {
        for format in Format::ALL {
            let mut case = Case::new(shape, segments(), format, 40 + i as u64);
            case.poison_unused();
            let job = case.job(format);
            let outs = if all_orders {
                run_in_all_orders(build, std::slice::from_ref(&job))
            } else {
                run(build, std::slice::from_ref(&job), 0)
            };
            let name = format!("{} of {shape:?}", job.launch.kernel);
            case.assert_close(&name, &numbers(&outs[0][0], format), format);
            assert!(outs[0][7].iter().all(|&byte| byte == 0), "{name}: counters are left");
        }
    }
}

#[test]
fn attention_equals_softmax() {
    check(Build::Plain, &SHAPES, false);
}

#[test]
fn attention_does_not_depend_on_the_order_of_threads_and_blocks() {
    check(Build::Plain, &[SHAPES[1], SHAPES[2], SHAPES[5]], true);
}

#[test]
fn no_attention_leaves_its_buffers() {
    check(Build::Sanitised, &[SHAPES[1], SHAPES[3], SHAPES[5], SHAPES[7], SHAPES[8]], false);
}

/// The same bits alone, among others, and with the same keys in other slots.
#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_where_its_keys_lie() {
    let shape = SHAPES[0];
    let format = Format::BF16;
    let case = Case::new(shape, segments(), format, 5);
    let together = run(Build::Plain, &[case.job(format)], 0);
    let (row_width, slot_width) =
        ((shape.heads * shape.head_size) as usize, (shape.kv_heads * shape.head_size) as usize);
    let mut jobs = Vec::new();
    let mut places = Vec::new();
    let mut row = 0;
    for segment in &case.segments {
        // One run from slot 0 on, copied from wherever the keys were.
        let length = segment.position() + segment.rows;
        let copied = |from: &[f32]| -> Vec<f32> {
            let slots = segment.spans.iter().flat_map(|span| span[0]..span[0] + span[1]);
            slots
                .flat_map(|slot| &from[slot as usize * slot_width..][..slot_width])
                .copied()
                .collect()
        };
        let alone = Case {
            shape,
            segments: vec![Segment { rows: segment.rows, spans: vec![[0, length as i64]] }],
            slots: length,
            q: case.q[row * row_width..(row + segment.rows) * row_width].to_vec(),
            keys: copied(&case.keys),
            values: copied(&case.values),
        };
        jobs.push(alone.job(format));
        places.push(row * row_width * 2..(row + segment.rows) * row_width * 2);
        row += segment.rows;
    }
    for (buffers, place) in run(Build::Plain, &jobs, 0).iter().zip(places) {
        assert!(buffers[0] == together[0][0][place.clone()], "rows at {place:?} differ");
    }
}

/// The sanitizers do stop the kernel.
#[test]
fn a_value_short_is_noticed() {
    let case = Case::new(SHAPES[3], vec![one_row(&[[0, 200]])], Format::F16, 6);
    let mut job = case.job(Format::F16);
    job.buffers[3].truncate(199 * 3 * 64 * 2 + 2 * 64 * 2 + 112);
    let output = output_of(Build::Sanitised, &[job], 0);
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && messages.contains("heap-buffer-overflow"), "{messages}");
}

/// Counts by hand: splits begin at 0, 128, 256; a window of 130 lies over two or three of them.
#[test]
fn splits_are_counted_for_the_row_that_has_most() {
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_size: 64, window: 0 };
    let counts = |shape: AttentionShape| [0, 127, 128, 256, 383].map(|at| shape.splits(at));
    assert_eq!(counts(shape), [1, 1, 2, 3, 3]);
    assert_eq!(counts(AttentionShape { window: 130, ..shape }), [1, 1, 2, 3, 2]);
    let most = |window: u32| {
        let shape = AttentionShape { window, ..shape };
        (0..2000).map(|at| shape.splits(at)).max()
    };
    for window in [1, 2, 128, 129, 130, 257, 258] {
        assert_eq!(most(window), Some(AttentionShape { window, ..shape }.most_splits(2000)));
    }
}
