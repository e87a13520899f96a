//! `arete push`: an adapter, a merged model or a data set to a repository of the hub, with a card.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use arete_model::adapter::card::{self, Details};
use arete_model::hub::{Content, Hub, Upload};

/// Upload an adapter, a merged model or a data set to the hub, with a card; what is there already is not sent again
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The token comes from HF_TOKEN, the hub's address from HF_ENDPOINT.\n\nExamples:
  arete push --directory runs/demo/reward/action/adapter --repository me/action --base-model me/base --private
  arete push --directory runs/demo/preferences --repository me/preferences --license mit --dry-run"
)]
pub struct PushArgs {
    /// Directory with an adapter, a merged model, or the Parquet files of a data set
    #[arg(long, value_name = "DIR")]
    directory: PathBuf,
    /// Repository to fill; it is made if it does not exist
    #[arg(long, value_name = "OWNER/NAME", value_parser = parse_repository)]
    repository: String,
    /// Hub id of the base model; needed where an adapter names a place on this machine
    #[arg(long, value_name = "OWNER/NAME")]
    base_model: Option<String>,
    /// Licence to state in the card (apache-2.0, mit, …)
    #[arg(long, value_name = "NAME", value_parser = parse_license)]
    license: Option<String>,
    /// Make the repository private, if it is made
    #[arg(long)]
    private: bool,
    /// Title of the commit
    #[arg(long, value_name = "TEXT", default_value = "Upload with arete push")]
    message: String,
    /// Show the card and the files instead of uploading
    #[arg(long)]
    dry_run: bool,
}

fn parse_repository(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((owner, name)) if !owner.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(text.to_owned())
        }
        _ => Err("expected owner/name, as in me/policy".to_owned()),
    }
}

fn parse_license(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("expected an identifier such as apache-2.0".to_owned()),
    }
}

/// Uploads, or shows what would be uploaded.
///
/// # Errors
///
/// A directory that holds nothing to publish, no token, a hub that refuses.
pub fn run(arguments: &PushArgs) -> anyhow::Result<()> {
    let PushArgs { directory, repository, .. } = arguments;
    let details = Details {
        title: repository.clone(),
        base_model: arguments.base_model.clone(),
        license: arguments.license.clone(),
    };
    let publication = card::prepare(directory, &details)
        .with_context(|| format!("preparing {}", directory.display()))?;
    let mut stdout = std::io::stdout().lock();
    if arguments.dry_run {
        for Upload { path, content } in &publication.files {
            let n_bytes = match content {
                Content::File(path) => fs_err::metadata(path)?.len(),
                Content::Bytes(bytes) => bytes.len() as u64,
            };
            writeln!(stdout, "{n_bytes:>12} {path}")?;
        }
        let card = publication.files.iter().find(|file| file.path == "README.md");
        if let Some(Upload { content: Content::Bytes(text), .. }) = card {
            writeln!(stdout, "\n{}", String::from_utf8_lossy(text))?;
        }
        return Ok(());
    }
    if std::env::var_os("HF_TOKEN").is_none_or(|token| token.is_empty()) {
        let message = "set HF_TOKEN to a token that may write to the repository: uploads take it from nowhere else";
        return Err(arete_stage::exit::Usage(message.to_owned()).into());
    }
    let hub = Hub::from_env()?;
    let kind = publication.artefact.repository();
    let files = &publication.files;
    let pushed = hub
        .push(kind, repository, arguments.private, files, &arguments.message)
        .with_context(|| format!("uploading {}", directory.display()))?;
    if !pushed.stale.is_empty() {
        tracing::warn!(stale = ?pushed.stale, "the repository holds weights or tables that the directory does not");
    }
    if pushed.changed.is_empty() {
        tracing::info!(page = pushed.page, "up to date");
    } else {
        tracing::info!(page = pushed.page, files = pushed.changed.len(), "uploaded");
    }
    let line = json!({"page": pushed.page, "commit": pushed.commit, "changed": pushed.changed});
    writeln!(stdout, "{line}").context("writing to stdout")
}
