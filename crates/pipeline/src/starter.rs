//! Folders to start from: what `arete new` writes for a study of one's own, and `arete hello` for a first look.

use std::path::{Path, PathBuf};

use anyhow::Result;
use arete_records::atomic;
use arete_stage::exit::Usage;

/// The prompts of `data/prompts`, all kinds in one file.
const PROMPTS: [&str; 6] = [
    include_str!("../../../data/prompts/advice.jsonl"),
    include_str!("../../../data/prompts/dilemmas.jsonl"),
    include_str!("../../../data/prompts/harmful.jsonl"),
    include_str!("../../../data/prompts/help.jsonl"),
    include_str!("../../../data/prompts/insults.jsonl"),
    include_str!("../../../data/prompts/privacy.jsonl"),
];
const CONSTITUTION: &str = include_str!("../../../data/constitution.toml");
const EXEMPLARS: &str = include_str!("../../../data/demonstrations/exemplars.jsonl");
const README: &str = include_str!("../templates/README.md");
const RECIPE: &str = include_str!("../templates/recipe.toml");
const HELLO: &str = include_str!("../templates/hello.toml");
/// A Llama of 220 kB with random weights and a chat template.
const TINY_CHAT: [(&str, &[u8]); 6] = [
    (
        "chat_template.jinja",
        include_bytes!("../../../tests/fixtures/tiny-chat/chat_template.jinja"),
    ),
    ("config.json", include_bytes!("../../../tests/fixtures/tiny-chat/config.json")),
    (
        "generation_config.json",
        include_bytes!("../../../tests/fixtures/tiny-chat/generation_config.json"),
    ),
    ("model.safetensors", include_bytes!("../../../tests/fixtures/tiny-chat/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../../tests/fixtures/tiny-chat/tokenizer.json")),
    (
        "tokenizer_config.json",
        include_bytes!("../../../tests/fixtures/tiny-chat/tokenizer_config.json"),
    ),
];

/// A study's files and what is in them.
type Files = Vec<(PathBuf, Vec<u8>)>;

/// What both folders hold.
fn data() -> Files {
    let prompts = PROMPTS.map(str::trim_end).join("\n") + "\n";
    let texts = [
        ("constitution.toml", CONSTITUTION),
        ("exemplars.jsonl", EXEMPLARS),
        ("prompts.jsonl", &prompts),
    ];
    texts.iter().map(|(name, text)| (PathBuf::from(name), text.as_bytes().to_vec())).collect()
}

/// A text as TOML writes it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Writes a starter folder: recipe, constitution, exemplars, prompts and a README, for a model.
///
/// # Errors
///
/// A file of that name is there already: then nothing is written. I/O.
pub fn new(dir: &Path, model: &str) -> Result<()> {
    let mut files = data();
    files.push(("recipe.toml".into(), RECIPE.replace("{model}", &quoted(model)).into_bytes()));
    files.push(("README.md".into(), README.as_bytes().to_vec()));
    if let Some((taken, _)) = files.iter().find(|(name, _)| dir.join(name).exists()) {
        let message =
            format!("{}: is there already; name another folder", dir.join(taken).display());
        return Err(Usage(message).into());
    }
    write(dir, files)
}

/// Writes what `arete hello` runs on into a folder; the recipe's path. Files of the same contents stay.
///
/// # Errors
///
/// A file of that name with other contents; I/O.
pub fn hello(dir: &Path) -> Result<PathBuf> {
    let mut files = data();
    files.extend(TINY_CHAT.map(|(name, bytes)| (Path::new("model").join(name), bytes.to_vec())));
    let mut recipe = HELLO.to_owned();
    for name in ["model", "constitution.toml", "exemplars.jsonl", "prompts.jsonl"] {
        let place = dir.join(name).to_string_lossy().into_owned();
        recipe = recipe.replace(&format!("{{dir/{name}}}"), &quoted(&place));
    }
    let path = dir.join("recipe.toml");
    files.push(("recipe.toml".into(), recipe.into_bytes()));
    let is_there =
        |name: &Path, bytes: &[u8]| fs_err::read(dir.join(name)).is_ok_and(|b| b == bytes);
    files.retain(|(name, bytes)| !is_there(name, bytes));
    if let Some((taken, _)) = files.iter().find(|(name, _)| dir.join(name).exists()) {
        let message =
            format!("{}: is not what hello wrote; name another --run", dir.join(taken).display());
        return Err(Usage(message).into());
    }
    write(dir, files)?;
    Ok(path)
}

fn write(dir: &Path, files: Files) -> Result<()> {
    for (name, bytes) in files {
        let path = dir.join(name);
        fs_err::create_dir_all(atomic::parent(&path))?;
        atomic::write(path, &bytes)?;
    }
    Ok(())
}
