//! Packed matrices for the machine.

use arete_model::cuda::plan::{self, Format, PackedAddresses};

use crate::machine::Job;
use crate::numbers::{Random, bytes_of, encoded, floats};

/// The scales of a packed matrix, as bytes.
#[derive(Clone)]
pub(crate) enum Scales {
    Single(Vec<u8>),
    /// Codes, what they stand for, factor and addend of every 256 blocks.
    Double([Vec<u8>; 3]),
}

impl Scales {
    /// As bitsandbytes keeps them: `absmax` of every 256 blocks, one `offset` for all.
    pub(crate) fn double(codes: Vec<u8>, map: Vec<u8>, absmax: &[u8], offset: &[u8]) -> Self {
        let offset = floats(offset)[0];
        let nested: Vec<f32> = floats(absmax).iter().flat_map(|&factor| [factor, offset]).collect();
        Self::Double([codes, map, bytes_of(&nested)])
    }
}

/// A packed matrix as buffers; `addresses` numbers them from `first` on.
#[derive(Clone)]
pub(crate) struct Packed {
    pub(crate) codes: Vec<u8>,
    pub(crate) codebook: Vec<u8>,
    pub(crate) scales: Scales,
    pub(crate) outputs: u32,
    pub(crate) inputs: u32,
    pub(crate) block_size: i64,
}

impl Packed {
    pub(crate) fn buffers(&self) -> Vec<Vec<u8>> {
        let mut buffers = vec![self.codes.clone(), self.codebook.clone()];
        match &self.scales {
            Scales::Single(absmax) => buffers.push(absmax.clone()),
            Scales::Double(parts) => buffers.extend(parts.iter().cloned()),
        }
        buffers
    }

    pub(crate) fn addresses(&self, first: u64) -> PackedAddresses {
        let (absmax, [codes, map, nested]) = match self.scales {
            Scales::Single(_) => (first + 2, [0; 3]),
            Scales::Double(_) => (0, [first + 2, first + 3, first + 4]),
        };
        PackedAddresses {
            codes: first,
            codebook: first + 1,
            absmax,
            absmax_codes: codes,
            absmax_map: map,
            absmax_nested: nested,
            outputs: self.outputs,
            inputs: self.inputs,
            block_log2: plan::block_log2(self.block_size).expect("a block size of bitsandbytes"),
        }
    }

    pub(crate) fn dequantize(&self, format: Format) -> Job {
        let n = self.outputs as usize * self.inputs as usize;
        let mut buffers = vec![vec![0xaa; n * format.size() as usize]];
        buffers.extend(self.buffers());
        Job { launch: plan::dequantize(1, format, &self.addresses(2)), buffers }
    }

    pub(crate) fn multiply(
        &self,
        x: &[f32],
        format: Format,
        rows: u32,
        multiprocessors: u32,
    ) -> Job {
        assert_eq!(x.len(), (rows * self.inputs) as usize);
        let y = vec![0xaa; (rows * self.outputs * format.size()) as usize];
        let mut buffers = vec![y, encoded(x, format)];
        buffers.extend(self.buffers());
        let launch = plan::multiply(1, 2, format, rows, &self.addresses(3), multiprocessors);
        Job { launch, buffers }
    }

    /// Random codes and scales, the latter double-quantised if asked for.
    pub(crate) fn random(
        codebook: &[u8],
        map: &[u8],
        outputs: u32,
        inputs: u32,
        block_size: i64,
        double: bool,
        random: &mut Random,
    ) -> Self {
        let n = u64::from(outputs) * u64::from(inputs);
        let blocks = n.div_ceil(block_size as u64);
        let mut scales = |n: u64| -> Vec<f32> {
            (0..n).map(|_| 2f32.powf(4.0 * random.number()) * 0.05).collect()
        };
        let scales = if double {
            // As of matrices held as one: every 256 blocks have an addend of their own.
            let nested = bytes_of(&scales(2 * blocks.div_ceil(256)));
            let codes = (0..blocks).map(|_| random.bits() as u8).collect();
            Scales::Double([codes, map.to_vec(), nested])
        } else {
            Scales::Single(bytes_of(&scales(blocks)))
        };
        Self {
            codes: (0..n.div_ceil(2)).map(|_| random.bits() as u8).collect(),
            codebook: codebook.to_vec(),
            scales,
            outputs,
            inputs,
            block_size,
        }
    }

    /// The weights by the format's definition: codebook · absmax, each product in f32.
    pub(crate) fn weights(&self) -> Vec<f32> {
        let codebook = floats(&self.codebook);
        let scales: Vec<f32> = match &self.scales {
            Scales::Single(absmax) => floats(absmax),
            Scales::Double([codes, map, nested]) => {
                let (map, nested) = (floats(map), floats(nested));
                let scale = |(block, &code): (usize, &u8)| {
                    let product = map[usize::from(code)] * nested[block / 256 * 2];
                    product + nested[block / 256 * 2 + 1]
                };
                codes.iter().enumerate().map(scale).collect()
            }
        };
        let n = self.outputs as usize * self.inputs as usize;
        (0..n)
            .map(|i| {
                let byte = self.codes[i / 2];
                let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                let block = i / self.block_size as usize;
                codebook[usize::from(code)] * scales[block]
            })
            .collect()
    }
}
