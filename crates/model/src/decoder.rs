//! The Llama/Mistral decoder: one forward pass for training, scoring and sampling.
//!
//! Tokens come packed without padding ([`Batch`]); the adapter and the key/value cache are passed in. The matrices
//! of query, key and value are one, and so are gate and up. See `csrc/ops.cpp` for what the operations keep for
//! the backward pass.
//!
//! # Source
//!
//! Touvron et al. 2023 (arXiv:2302.13971), Jiang et al. 2023 (arXiv:2310.06825); names as in transformers'
//! `modeling_llama.py`.

use std::path::PathBuf;

use tch::{Device, Kind, Tensor};

use crate::adapter::lora::{Adapter, PreparedLayer, Target};
use crate::batch::{Batch, Tables};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::nf4::{Nf4Options, Nf4Tensor};
use crate::ops::WeightRef;
use crate::{Error, machine, ops, self_test};

/// A weight matrix as it is held.
#[derive(Debug)]
pub(crate) enum Linear {
    /// `[out, in]` in the compute dtype.
    Dense(Tensor),
    /// Packed to four bits.
    Nf4(Nf4Tensor),
}

impl Linear {
    fn apply(
        &self,
        x: &Tensor,
        adapter: Option<&(Tensor, Tensor)>,
        allow_packed: bool,
    ) -> Result<Tensor, Error> {
        ops::linear(x, &self.weight(), adapter.map(|(a, b)| (a, b)), allow_packed)
    }

    fn weight(&self) -> WeightRef<'_> {
        match self {
            Self::Dense(weight) => WeightRef::Dense(weight),
            Self::Nf4(weight) => WeightRef::Nf4(weight),
        }
    }

    fn n_bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => tensor_bytes(weight),
            Self::Nf4(weight) => weight.n_bytes(),
        }
    }
}

fn tensor_bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// One block.
#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    qkv: Linear,
    output: Linear,
    post_attention_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

impl Layer {
    /// Whether one of its matrices at least is held in four bits.
    fn is_packed(&self) -> bool {
        [&self.qkv, &self.output, &self.gate_up, &self.down]
            .into_iter()
            .any(|linear| matches!(linear, Linear::Nf4(_)))
    }
}

/// Where the blocks' weights are.
#[derive(Debug)]
enum Layers {
    /// In memory.
    Held(Vec<Layer>),
    /// In their files, read again for every pass.
    OnDisk { checkpoint: Box<Checkpoint>, options: LoadOptions },
}

/// How the weights are held.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Where.
    pub device: Device,
    /// Compute dtype: f32, bf16 or (CUDA) f16.
    pub dtype: Kind,
    /// Pack the blocks' matrices to four bits; `None` keeps what the checkpoint has.
    pub nf4: Option<Nf4Options>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: default_dtype(Device::Cpu), nf4: None }
    }
}

/// bf16 where the device computes in it; else f32 on a CPU, f16 on a GPU.
pub fn default_dtype(device: Device) -> Kind {
    match device {
        Device::Cuda(index) => {
            crate::cuda::generation_of(index).map_or(Kind::BFloat16, crate::cuda::default_kind)
        }
        Device::Cpu if !ops::multiplies_bf16() => Kind::Float,
        _ => Kind::BFloat16,
    }
}

/// The frozen weights of a decoder-only transformer.
#[derive(Debug)]
pub struct Decoder {
    /// Where the weights came from, for messages.
    path: PathBuf,
    config: ModelConfig,
    device: Device,
    kind: Kind,
    embedding: Tensor,
    layers: Layers,
    norm: Tensor,
    /// `[V, D]`; the embedding itself where they are tied; a reward model has none.
    head: Option<Tensor>,
    /// The head in bf16, for packed decoding on the CPU: in f32 half the bytes to read for a token.
    lean_head: Option<Tensor>,
    /// `[positions, E]` f32: cosines of the first half, then sines.
    cos_sin: Tensor,
    quantization: Option<Nf4Options>,
    packed_decoding: bool,
}

/// A forward pass whose backward pass runs through [`Pass::backward`].
///
/// Without recomputation this is plain autograd. With it, only each block's input is kept, and the blocks run
/// again during the backward pass.
#[derive(Debug)]
pub struct Pass<'a> {
    /// `[N, D]` in the compute dtype, after the final norm.
    pub hidden: Tensor,
    kept: Option<Recomputation<'a>>,
}

#[derive(Debug)]
struct Recomputation<'a> {
    decoder: &'a Decoder,
    adapter: &'a Adapter,
    batch: &'a Batch,
    inputs: Vec<Tensor>,
    last: Tensor,
}

impl Pass<'_> {
    /// Adds the gradients of `loss` (a scalar computed from [`Pass::hidden`]) to the adapter's tensors.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if libtorch refuses (out of memory).
    pub fn backward(self, loss: &Tensor) -> Result<(), Error> {
        loss.f_backward()?;
        let Some(kept) = self.kept else { return Ok(()) };
        let grad = self.hidden.grad();
        if !grad.defined() {
            return Ok(()); // the loss does not depend on the hidden states
        }
        kept.backward(grad)
    }
}

impl Recomputation<'_> {
    fn backward(self, grad: Tensor) -> Result<(), Error> {
        let decoder = self.decoder;
        let eps = decoder.config.rms_norm_eps;
        let leaf = self.last.set_requires_grad(true);
        let (out, _) = ops::rms_norm(&leaf, None, &decoder.norm, eps)?;
        let mut grad = pull_back(&out, &grad, &leaf)?;
        let positions = self.batch.position_tensor(decoder.device)?;
        // Added to each block's input, so that both gradients of that are summed before they are rounded, as without recomputation:
        // the bits are the same.
        let nothing = grad.f_zeros_like()?; // [N, D]
        for (idx, input) in self.inputs.into_iter().enumerate().rev() {
            let leaf = input.set_requires_grad(true);
            let prepared = self.adapter.prepare(&decoder.config, idx, decoder.kind)?;
            let attend = |qkv: &Tensor| decoder.attend(qkv, &positions, &self.batch.tables);
            let (hidden, delta) =
                decoder.block(idx, &leaf, Some(&nothing), Some(&prepared), attend)?;
            grad = pull_back(&(hidden + delta), &grad, &leaf)?;
        }
        Ok(())
    }
}

/// Runs `out`'s backward pass with `grad` as its gradient; the gradient of `leaf`.
fn pull_back(out: &Tensor, grad: &Tensor, leaf: &Tensor) -> Result<Tensor, Error> {
    (out * grad).sum(None::<Kind>).f_backward()?;
    Ok(leaf.grad())
}

impl Decoder {
    /// Streams the weights out of `checkpoint`, one tensor at a time.
    ///
    /// # Errors
    ///
    /// A missing tensor, a wrong shape or dtype, an unreadable file.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, Error> {
        let _guard = tch::no_grad_guard();
        let n_layers = checkpoint.config().num_layers;
        let mut decoder = Self::without_layers(checkpoint, options)?;
        let loader = Loader { checkpoint, options, config: &decoder.config };
        let what = if options.nf4.is_some() { "loading, packing" } else { "loading" };
        let progress = arete_records::progress::start(what, "layers", n_layers as u64);
        let mut layers = Vec::with_capacity(n_layers);
        let mut packed_in_checkpoint = false;
        for idx in 0..n_layers {
            let layer = loader.layer(idx)?;
            packed_in_checkpoint |= layer.is_packed() && options.nf4.is_none();
            layers.push(layer);
            progress.inc(1);
        }
        if options.device == Device::Cpu && matches!(options.dtype, Kind::Float | Kind::BFloat16) {
            let first = layers.first().map(|layer| {
                [
                    ("query, key, value", &layer.qkv),
                    ("attention's output", &layer.output),
                    ("gate, up", &layer.gate_up),
                    ("down", &layer.down),
                ]
                .map(|(name, linear)| (name, linear.weight()))
            });
            let head = decoder.head.iter().map(|head| ("vocabulary", WeightRef::Dense(head)));
            let products: Vec<_> = first.into_iter().flatten().chain(head).collect();
            self_test::run(decoder.kind, &products)?;
        }
        decoder.layers = Layers::Held(layers);
        decoder.quantization =
            options.nf4.or_else(|| packed_in_checkpoint.then(Nf4Options::default));
        Ok(decoder)
    }

    /// A decoder that leaves the blocks on disk and reads them, one at a time, in every pass: slow, but it holds the
    /// vocabulary matrices and a single block only. For a look at a model that was just written.
    ///
    /// # Errors
    ///
    /// As [`Decoder::load`]; a pass may fail with them too.
    pub fn streamed(checkpoint: Checkpoint, options: &LoadOptions) -> Result<Self, Error> {
        let _guard = tch::no_grad_guard();
        let mut decoder = Self::without_layers(&checkpoint, options)?;
        decoder.quantization = options.nf4;
        decoder.layers = Layers::OnDisk { checkpoint: Box::new(checkpoint), options: *options };
        Ok(decoder)
    }

    fn without_layers(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, Error> {
        machine::keep_to_cores();
        if let Device::Cuda(index) = options.device {
            crate::cuda::require(index)?;
            #[cfg(feature = "cuda")]
            crate::cuda::install(index, options.dtype)?;
        }
        let config = checkpoint.config().clone();
        let loader = Loader { checkpoint, options, config: &config };
        let (hidden, vocabulary) = (config.hidden_size as i64, config.vocab_size as i64);
        let embedding = loader.dense("model.embed_tokens.weight", &[vocabulary, hidden])?;
        let norm = loader.dense("model.norm.weight", &[hidden])?;
        let head = match (config.sequence_classification, config.tie_word_embeddings) {
            (true, _) => None,
            (false, true) => Some(embedding.shallow_clone()),
            (false, false) => Some(loader.dense("lm_head.weight", &[vocabulary, hidden])?),
        };
        let cos_sin = rotary_table(&config)?.f_to_device(options.device)?;
        Ok(Self {
            path: checkpoint.path().to_path_buf(),
            device: options.device,
            kind: options.dtype,
            embedding,
            layers: Layers::Held(Vec::new()),
            norm,
            head,
            lean_head: None,
            cos_sin,
            quantization: None,
            packed_decoding: false,
            config,
        })
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The compute dtype.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How the blocks' matrices are packed, if they are.
    pub fn quantization(&self) -> Option<Nf4Options> {
        self.quantization
    }

    /// Lets up to four rows multiply four-bit weights without unpacking them, and in f32 on the CPU the vocabulary
    /// matrix rounded to bf16 (exact where the checkpoint is bf16): several times faster for a lone sequence, but
    /// its bits then differ from those of the same sequence in a larger batch. Off at first; dense weights are
    /// not concerned.
    pub fn set_packed_decoding(&mut self, allowed: bool) {
        self.packed_decoding = allowed;
        let lean = allowed
            && self.quantization.is_some()
            && self.device == Device::Cpu
            && matches!(self.kind, Kind::Float | Kind::BFloat16);
        let head = self.head.as_ref().filter(|_| lean);
        self.lean_head = head.map(|head| head.to_kind(Kind::BFloat16)); // in bf16 the head itself
    }

    /// The vocabulary matrix `[V, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a reward model, which has none: it cannot say or weigh a word.
    pub fn head(&self) -> Result<&Tensor, Error> {
        self.head.as_ref().ok_or_else(|| {
            let expected = "a language model (…ForCausalLM)";
            let found =
                "a reward model (…ForSequenceClassification), which has no vocabulary matrix";
            Error::field(&self.path, "architectures", expected, found)
        })
    }

    /// Whether this is a language model: it has a vocabulary matrix.
    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Bytes held by the weights.
    pub fn n_bytes(&self) -> usize {
        let mut held = vec![&self.embedding];
        for tensor in [&self.head, &self.lean_head].into_iter().flatten() {
            if held.iter().all(|other| other.data_ptr() != tensor.data_ptr()) {
                held.push(tensor);
            }
        }
        self.block_bytes() + held.into_iter().map(tensor_bytes).sum::<usize>()
    }

    fn block_bytes(&self) -> usize {
        let linears = |layer: &Layer| {
            [&layer.qkv, &layer.output, &layer.gate_up, &layer.down].map(Linear::n_bytes)
        };
        let held = match &self.layers {
            Layers::Held(layers) => layers.as_slice(),
            Layers::OnDisk { .. } => &[],
        };
        held.iter().flat_map(linears).sum()
    }

    /// Bytes of weights that one token's forward pass reads: all but the embedding, with the head as it is held.
    pub fn bytes_per_token(&self) -> usize {
        let head = self.lean_head.as_ref().or(self.head.as_ref());
        self.block_bytes() + head.map_or(0, tensor_bytes)
    }

    /// Hidden states of every token after the final norm; gradients flow into the adapter's tensors.
    ///
    /// # Shapes
    ///
    /// - result: `[N, D]` in the compute dtype, N = `batch.n_tokens()`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if a sequence is longer than the model's positions or has a token that is not in its
    /// vocabulary; [`Error::Torch`] if memory runs out.
    pub fn forward(&self, batch: &Batch, adapter: Option<&Adapter>) -> Result<Tensor, Error> {
        let (last, delta, _) = self.blocks(batch, adapter, false)?;
        Ok(ops::rms_norm(&last, delta.as_ref(), &self.norm, self.config.rms_norm_eps)?.0)
    }

    /// [`Decoder::forward`] for training, optionally keeping only the blocks' inputs.
    ///
    /// # Errors
    ///
    /// As [`Decoder::forward`].
    pub fn pass<'a>(
        &'a self,
        batch: &'a Batch,
        adapter: &'a Adapter,
        recompute: bool,
    ) -> Result<Pass<'a>, Error> {
        if !recompute {
            return Ok(Pass { hidden: self.forward(batch, Some(adapter))?, kept: None });
        }
        let _guard = tch::no_grad_guard();
        let (last, _, inputs) = self.blocks(batch, Some(adapter), true)?;
        let (hidden, _) = ops::rms_norm(&last, None, &self.norm, self.config.rms_norm_eps)?;
        let kept = Recomputation { decoder: self, adapter, batch, inputs, last };
        Ok(Pass { hidden: hidden.set_requires_grad(true), kept: Some(kept) })
    }

    /// Runs every block; keeps their inputs if asked. Returns the stream and what is still to be added to it.
    fn blocks(
        &self,
        batch: &Batch,
        adapter: Option<&Adapter>,
        keep: bool,
    ) -> Result<(Tensor, Option<Tensor>, Vec<Tensor>), Error> {
        self.check_length(batch.longest())?;
        self.check_tokens(batch.token_ids())?;
        let positions = batch.position_tensor(self.device)?;
        let mut hidden = self.embed(&batch.token_tensor(self.device)?)?; // [N, D]
        let mut delta: Option<Tensor> = None;
        let mut inputs = Vec::new();
        for idx in 0..self.n_layers() {
            if keep {
                inputs.push(hidden.shallow_clone());
            }
            let prepared =
                adapter.map(|adapter| adapter.prepare(&self.config, idx, self.kind)).transpose()?;
            let attend = |qkv: &Tensor| self.attend(qkv, &positions, &batch.tables);
            let (stream, added) =
                self.block(idx, &hidden, delta.as_ref(), prepared.as_ref(), attend)?;
            if keep {
                hidden = stream + added;
            } else {
                (hidden, delta) = (stream, Some(added));
            }
        }
        Ok((hidden, delta, inputs))
    }

    fn attend(&self, qkv: &Tensor, positions: &Tensor, tables: &Tables) -> Result<Tensor, Error> {
        ops::attention(qkv, positions, &self.cos_sin, tables, &self.config, false)
    }

    /// One block on the stream `hidden + delta`: the stream after attention, and what the feed-forward network adds.
    pub(crate) fn block(
        &self,
        idx: usize,
        hidden: &Tensor,
        delta: Option<&Tensor>,
        adapter: Option<&PreparedLayer>,
        mut attend: impl FnMut(&Tensor) -> Result<Tensor, Error>,
    ) -> Result<(Tensor, Tensor), Error> {
        let read;
        let layer = match &self.layers {
            Layers::Held(layers) => &layers[idx],
            Layers::OnDisk { checkpoint, options } => {
                read = Loader { checkpoint, options, config: &self.config }.layer(idx)?;
                &read
            }
        };
        let eps = self.config.rms_norm_eps;
        let packed = self.packed_decoding;
        let (normal, hidden) = ops::rms_norm(hidden, delta, &layer.input_norm, eps)?; // [N, D]
        let qkv = layer.qkv.apply(&normal, adapter.and_then(|a| a.qkv.as_ref()), packed)?; // [N, (H + 2K)·E]
        let mixed = attend(&qkv)?; // [N, H·E]
        let delta = layer.output.apply(&mixed, adapter.and_then(|a| a.output.as_ref()), packed)?; // [N, D]
        let (normal, hidden) =
            ops::rms_norm(&hidden, Some(&delta), &layer.post_attention_norm, eps)?;
        let gate_up =
            layer.gate_up.apply(&normal, adapter.and_then(|a| a.gate_up.as_ref()), packed)?; // [N, 2F]
        let inner = ops::swiglu(&gate_up)?; // [N, F]
        let delta = layer.down.apply(&inner, adapter.and_then(|a| a.down.as_ref()), packed)?; // [N, D]
        Ok((hidden, delta))
    }

    /// Number of blocks.
    pub(crate) fn n_layers(&self) -> usize {
        self.config.num_layers
    }

    /// The embeddings of `token_ids` `[N]`: `[N, D]`.
    pub(crate) fn embed(&self, token_ids: &Tensor) -> Result<Tensor, Error> {
        Ok(self.embedding.f_index_select(0, token_ids)?)
    }

    /// The final norm of `hidden + delta`.
    pub(crate) fn final_norm(&self, hidden: &Tensor, delta: &Tensor) -> Result<Tensor, Error> {
        Ok(ops::rms_norm(hidden, Some(delta), &self.norm, self.config.rms_norm_eps)?.0)
    }

    /// `[positions, E]` f32.
    pub(crate) fn cos_sin(&self) -> &Tensor {
        &self.cos_sin
    }

    /// Logits of given hidden rows, without gradients (log-probabilities with gradients: [`crate::logprobs`]).
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[n, D]`; the result is `[n, V]` in the compute dtype.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] if memory runs out, [`Error::NonFinite`] if one is NaN or infinite, and as [`Decoder::head`].
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, Error> {
        let logits = self.unchecked_logits(hidden)?;
        self.check_finite("logits", &logits)?;
        Ok(logits)
    }

    /// [`Decoder::logits`] for [`ops::sample`], which looks at every one itself.
    pub(crate) fn unchecked_logits(&self, hidden: &Tensor) -> Result<Tensor, Error> {
        match &self.lean_head {
            Some(lean) if hidden.size()[0] <= ops::packed_rows() => ops::logits(hidden, lean, true),
            _ => ops::logits(hidden, self.head()?, false),
        }
    }

    /// Refuses numbers of a forward pass that are NaN or infinite: what is made of them would be silently wrong.
    ///
    /// # Errors
    ///
    /// [`Error::NonFinite`], with what can be done.
    pub fn check_finite(&self, what: &str, numbers: &Tensor) -> Result<(), Error> {
        // A sum is one pass, and finite only if every number is (or it overflowed: then the second look decides).
        let numbers = numbers.detach();
        let sum = numbers.f_sum(Kind::Float)?.double_value(&[]);
        if sum.is_finite() || numbers.f_isfinite()?.f_all()?.int64_value(&[]) == 1 {
            return Ok(());
        }
        let dtype = crate::machine::runtime::dtype_name(self.kind);
        let what = format!(
            "{}: a number among the {what} (the weights are finite, so the computation in {dtype} overflowed: try another \
             --dtype)",
            self.path.display()
        );
        Err(Error::NonFinite { what })
    }

    /// Refuses ids that have no embedding: a tokenizer may know more tokens than the model.
    pub(crate) fn check_tokens(&self, token_ids: &[i64]) -> Result<(), Error> {
        let size = self.config.vocab_size as i64;
        match token_ids.iter().find(|id| !(0..size).contains(*id)) {
            Some(id) => Err(Error::Invalid {
                name: "token id",
                expected: format!("one of the model's vocabulary of {size}"),
                got: id.to_string(),
            }),
            None => Ok(()),
        }
    }

    /// Refuses sequences longer than the model has positions.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`].
    pub fn check_length(&self, length: usize) -> Result<(), Error> {
        let limit = self.config.max_position_embeddings;
        if length > limit {
            return Err(Error::Invalid {
                name: "sequence length",
                expected: format!("at most {limit} tokens (the model's max_position_embeddings)"),
                got: format!("{length} tokens"),
            });
        }
        Ok(())
    }
}

/// Reads tensors in the form the decoder holds them.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    config: &'a ModelConfig,
}

impl Loader<'_> {
    fn dense(&self, name: &str, shape: &[i64]) -> Result<Tensor, Error> {
        self.checkpoint.expect_shape(name, shape)?;
        let tensor = self.checkpoint.tensor_as(name, self.options.dtype)?;
        Ok(tensor.to_device(self.options.device))
    }

    fn layer(&self, idx: usize) -> Result<Layer, Error> {
        let hidden = self.config.hidden_size as i64;
        let norm = |name: &str| self.dense(&format!("model.layers.{idx}.{name}.weight"), &[hidden]);
        Ok(Layer {
            input_norm: norm("input_layernorm")?,
            qkv: self.linear(idx, &[Target::Q, Target::K, Target::V])?,
            output: self.linear(idx, &[Target::O])?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate_up: self.linear(idx, &[Target::Gate, Target::Up])?,
            down: self.linear(idx, &[Target::Down])?,
        })
    }

    /// The matrices of `targets`, one below the other: packed if all of them are, else dense. A checkpoint may leave single
    /// matrices dense (bitsandbytes' `llm_int8_skip_modules`); the packed ones beside them are unpacked then.
    fn linear(&self, idx: usize, targets: &[Target]) -> Result<Linear, Error> {
        let (mut packed, mut parts) = (Vec::new(), Vec::new());
        for target in targets {
            let (outputs, inputs) = target.size(self.config);
            let shape = [outputs as i64, inputs as i64];
            let name = format!("model.layers.{idx}.{}.weight", target.module());
            if let Some(weight) = self.checkpoint.nf4(&name)? {
                if [weight.outputs, weight.inputs] != shape {
                    return Err(Error::Shape {
                        name: "packed weight",
                        expected: shape.to_vec(),
                        got: vec![weight.outputs, weight.inputs],
                    });
                }
                packed.push(weight);
            } else if let Some(options) = self.options.nf4 {
                let weight = self.checkpoint.tensor_of_shape(&name, &shape)?;
                packed.push(Nf4Tensor::quantize(&weight, options)?);
            }
            parts.push((name, shape));
        }
        let device = self.options.device;
        if packed.len() == targets.len() {
            let reads_double = ops::gpu_shaped(device, self.options.dtype);
            return Ok(Linear::Nf4(Nf4Tensor::stack(&packed)?.placed(device, reads_double)));
        }
        if packed.is_empty() {
            let whole = self.checkpoint.stacked(&parts, self.options.dtype)?;
            return Ok(Linear::Dense(whole.to_device(device)));
        }
        let mut matrices = Vec::with_capacity(parts.len());
        for (name, shape) in &parts {
            self.checkpoint.expect_shape(name, shape)?;
            matrices.push(self.checkpoint.tensor_as(name, self.options.dtype)?);
        }
        Ok(Linear::Dense(Tensor::f_cat(&matrices, 0)?.to_device(device)))
    }
}

/// Angles of the rotary embedding, in f32 as transformers computes them.
fn rotary_table(config: &ModelConfig) -> Result<Tensor, Error> {
    let inverse = Tensor::from_slice(&config.inverse_frequencies()).unsqueeze(0); // [1, E/2]
    let positions =
        Tensor::f_arange(config.max_position_embeddings as i64, (Kind::Float, Device::Cpu))?;
    let half = inverse.size()[1];
    // Filled in place: it can be the largest thing in memory.
    let table = Tensor::f_empty([positions.size()[0], 2 * half], (Kind::Float, Device::Cpu))?;
    let (mut cos, mut sin) = (table.f_narrow(1, 0, half)?, table.f_narrow(1, half, half)?);
    for angles in [&mut cos, &mut sin] {
        angles.f_copy_(&positions.unsqueeze(1))?; // [positions, E/2]
        let _ = angles.f_mul_(&inverse)?;
    }
    let (_, _) = (cos.f_cos_()?, sin.f_sin_()?);
    Ok(table) // [positions, E]
}

#[cfg(all(test, feature = "cuda"))]
mod both_paths;
#[cfg(test)]
mod equal_rows;
#[cfg(all(test, feature = "cuda"))]
mod shapes;
