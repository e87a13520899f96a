//! Files of models: weights, configurations, tokenizers, templates, adapters, and what the hub answers.

use anyhow::Result;
use arete_model::adapter;
use arete_model::checkpoint::gguf::Gguf;
use arete_model::checkpoint::safetensors::{SafetensorsFile, write_safetensors};
use arete_model::hub;
use arete_model::{ChatTemplate, Checkpoint, Device, Message, ModelConfig, Source, Tokenizer};
use serde_json::Value;

use super::{Kind, Place, Target, same};

const TINY: &str = "tests/fixtures/tiny-chat";

pub(super) const TARGETS: &[Target] = &[
    Target {
        name: "safetensors",
        reads: "the header and tensors of a safetensors file",
        kind: Kind::HeadedJson,
        seeds: &["crates/model/tests/goldens/safetensors", "crates/ppo/tests/goldens"],
        n_quick: 2000,
        run: safetensors,
    },
    Target {
        name: "index",
        reads: "model.safetensors.index.json",
        kind: Kind::Json,
        seeds: &[],
        n_quick: 600,
        run: index,
    },
    Target {
        name: "gguf",
        reads: "a GGUF file: header, metadata, blocks of weights",
        kind: Kind::Binary,
        seeds: &["crates/model/tests/goldens/gguf", "crates/model/tests/goldens/llama_cpp"],
        n_quick: 1500,
        run: gguf,
    },
    Target {
        name: "gguf_model",
        reads: "a GGUF file as a model: configuration, vocabulary, names of tensors",
        kind: Kind::Binary,
        seeds: &["crates/model/tests/goldens/llama_cpp"],
        n_quick: 500,
        run: gguf_model,
    },
    Target {
        name: "config",
        reads: "config.json",
        kind: Kind::Json,
        seeds: &["crates/model/tests/goldens/config", "tests/fixtures/tiny-chat/config.json"],
        n_quick: 3000,
        run: config,
    },
    Target {
        name: "generation_config",
        reads: "generation_config.json",
        kind: Kind::Json,
        seeds: &["tests/fixtures/tiny-chat/generation_config.json"],
        n_quick: 600,
        run: generation_config,
    },
    Target {
        name: "tokenizer",
        reads: "tokenizer.json",
        kind: Kind::Json,
        seeds: &["tests/fixtures/tiny-chat/tokenizer.json"],
        n_quick: 500,
        run: tokenizer,
    },
    Target {
        name: "tokenizer_config",
        reads: "tokenizer_config.json",
        kind: Kind::Json,
        seeds: &[
            "tests/fixtures/tiny-chat/tokenizer_config.json",
            "crates/model/tests/goldens/llama_untied/tokenizer_config.json",
            "crates/model/tests/goldens/llama_cpp/spm/tokenizer_config.json",
        ],
        n_quick: 400,
        run: tokenizer_config,
    },
    Target {
        name: "special_tokens_map",
        reads: "special_tokens_map.json",
        kind: Kind::Json,
        seeds: &["tests/fixtures/tiny-chat/tokenizer_config.json"],
        n_quick: 400,
        run: special_tokens_map,
    },
    Target {
        name: "template",
        reads: "a chat template",
        kind: Kind::Text,
        seeds: &["tests/fixtures/tiny-chat/chat_template.jinja"],
        n_quick: 1500,
        run: template,
    },
    Target {
        name: "adapter_config",
        reads: "adapter_config.json",
        kind: Kind::Json,
        seeds: &[
            "crates/model/tests/goldens/peft/causal/adapter_config.json",
            "crates/model/tests/goldens/peft/partial/adapter_config.json",
            "crates/model/tests/goldens/peft/reward/adapter_config.json",
        ],
        n_quick: 500,
        run: adapter_config,
    },
    Target {
        name: "hub_answer",
        reads: "what the hub lists of a repository's files, with the address of the next page",
        kind: Kind::Text,
        seeds: &[],
        n_quick: 2000,
        run: hub_answer,
    },
    Target {
        name: "model_name",
        reads: "what is given as --model: a path or a hub id",
        kind: Kind::Text,
        seeds: &[],
        n_quick: 2000,
        run: model_name,
    },
];

fn safetensors(place: &Place, input: &[u8]) -> Result<()> {
    let file = SafetensorsFile::open(&place.put("x.safetensors", input)?)?;
    let mut tensors = Vec::new();
    for name in file.names() {
        tensors.push((name.to_owned(), file.tensor(name)?));
    }
    let again = place.at("y.safetensors");
    write_safetensors(&again, &tensors)?;
    let again = SafetensorsFile::open(&again)?;
    same("names", &tensors.len(), &again.names().count())?;
    for (name, tensor) in &tensors {
        same("shape", &again.shape(name), &Some(tensor.size().as_slice()))?;
        same("dtype", &again.kind(name), &Some(tensor.kind()))?;
        same("numbers", &again.tensor(name)?.equal(tensor), &true)?;
    }
    Ok(())
}

fn index(place: &Place, input: &[u8]) -> Result<()> {
    place.keep("config.json", &format!("{TINY}/config.json"))?;
    place.keep("w.safetensors", &format!("{TINY}/model.safetensors"))?;
    place.put("model.safetensors.index.json", input)?;
    Checkpoint::open(&Source::Directory(place.dir().to_owned()))?;
    Ok(())
}

fn gguf(place: &Place, input: &[u8]) -> Result<()> {
    let file = Gguf::open(&place.put("x.gguf", input)?)?;
    let names: Vec<String> = file.tensors().keys().cloned().collect();
    for name in names {
        let tensor = file.tensor(&name)?;
        same("shape", &tensor.size(), &file.tensors()[&name].shape)?;
    }
    Ok(())
}

fn gguf_model(place: &Place, input: &[u8]) -> Result<()> {
    let checkpoint = Checkpoint::open(&Source::Gguf(place.put("x.gguf", input)?))?;
    tokenise(&checkpoint.tokenizer()?)?;
    for name in checkpoint.names() {
        checkpoint.shape(&name)?;
    }
    Ok(())
}

fn config(place: &Place, input: &[u8]) -> Result<()> {
    place.put("config.json", input)?;
    let config = ModelConfig::from_directory(place.dir())?;
    config.expected_tensors();
    config.inverse_frequencies();
    let written = config.to_json(arete_model::Kind::Float);
    let again = ModelConfig::from_json(&place.at("config.json"), &written)?;
    same("configuration", &config, &again)
}

fn generation_config(place: &Place, input: &[u8]) -> Result<()> {
    for name in ["config.json", "model.safetensors"] {
        place.keep(name, &format!("{TINY}/{name}"))?;
    }
    place.put("generation_config.json", input)?;
    let checkpoint = Checkpoint::open(&Source::Directory(place.dir().to_owned()))?;
    let settings = checkpoint.generation_settings()?;
    place.put("generation_config.json", &serde_json::to_vec(&settings)?)?;
    same("settings", &checkpoint.generation_settings()?, &settings)
}

/// Encodes and decodes a few texts.
fn tokenise(tokenizer: &Tokenizer) -> Result<()> {
    for text in ["", "Is it fair?", "<s> é🙂\u{301} \n\n  x</s>", &"ab ".repeat(100)] {
        for add_special in [false, true] {
            let ids = tokenizer.encode(text, add_special)?;
            tokenizer.decode(&ids)?;
            tokenizer.decode_with_special(&ids)?;
        }
    }
    tokenizer.decode(&[-1, 0, 5, i64::MAX])?;
    Ok(())
}

fn tokenizer(place: &Place, input: &[u8]) -> Result<()> {
    place.put("tokenizer.json", input)?;
    let tokenizer = Tokenizer::from_directory(place.dir())?;
    tokenise(&tokenizer)?;
    let saved = place.fresh("saved")?;
    tokenizer.save(&saved)?;
    let again = Tokenizer::from_directory(&saved)?;
    let text = "Is it fair? é🙂";
    same("tokens", &tokenizer.encode(text, true)?, &again.encode(text, true)?)
}

fn tokenizer_config(place: &Place, input: &[u8]) -> Result<()> {
    place.keep("tokenizer.json", &format!("{TINY}/tokenizer.json"))?;
    place.put("tokenizer_config.json", input)?;
    let tokenizer = Tokenizer::from_directory(place.dir())?;
    tokenise(&tokenizer)?;
    render(&tokenizer.template()?)
}

fn special_tokens_map(place: &Place, input: &[u8]) -> Result<()> {
    place.keep("tokenizer.json", &format!("{TINY}/tokenizer.json"))?;
    place.keep("tokenizer_config.json", &format!("{TINY}/tokenizer_config.json"))?;
    place.put("special_tokens_map.json", input)?;
    tokenise(&Tokenizer::from_directory(place.dir())?)
}

/// Renders a few conversations.
fn render(template: &ChatTemplate) -> Result<()> {
    let conversations = [
        vec![Message::user("Is it fair?")],
        vec![Message::system("Be kind."), Message::user("{{ x }}"), Message::assistant("Yes.\n")],
        Vec::new(),
    ];
    let _ = template.refuses_system();
    for messages in &conversations {
        template.render(messages, true)?;
        template.fit(messages)?;
    }
    Ok(())
}

fn template(place: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    let variables = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    let template = ChatTemplate::new(&place.at("chat_template.jinja"), &text, variables)?;
    render(&template)
}

fn adapter_config(place: &Place, input: &[u8]) -> Result<()> {
    let peft = "crates/model/tests/goldens/peft/causal";
    place.keep("config.json", "crates/model/tests/goldens/llama_untied/config.json")?;
    let model = ModelConfig::from_directory(place.dir())?;
    let dir = place.at("adapter");
    fs_err::create_dir_all(&dir)?;
    place
        .keep("adapter/adapter_model.safetensors", &format!("{peft}/adapter_model.safetensors"))?;
    place.put("adapter/adapter_config.json", input)?;
    adapter::packing(&dir)?;
    let loaded = adapter::load(&dir, "x", &model, Device::Cpu)?;
    same("scale is finite", &loaded.adapter.config.scale().is_finite(), &true)
}

/// The first line is a `Link` header, the rest the answer.
fn hub_answer(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    let (link, body) = text.split_once('\n').unwrap_or(("", &text));
    if let Some(next) = hub::next_page(link) {
        same("address in the header", &link.contains(&next), &true)?;
    }
    let Ok(body) = serde_json::from_str::<Value>(body) else { return Ok(()) };
    let refused = |reason: String| arete_records::Refusal::setting("answer", "files", reason);
    for file in hub::RemoteFile::list(&body).map_err(refused)? {
        let path = hub::safe_rel_path(&file.path).map_err(refused)?;
        let is_inside =
            path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        same("a path inside", &is_inside, &true)?;
    }
    Ok(())
}

fn model_name(_: &Place, input: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(input);
    if text.contains('\0') || text.starts_with('/') {
        return Ok(()); // no program gets the first, and the second may name any file of this machine
    }
    let source = Source::parse(&text)?;
    same("name", &Source::parse(&source.to_string())?, &source)
}
