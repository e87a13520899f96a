//! The plan as tables and as JSON.

use serde_json::{Map, Value, json};

use super::{GPU_SIZES_GB, Planned, Shape};

/// As JSON: bytes of every part and phase, and which GPUs each stage fits.
pub fn json(stages: &[Planned], shape: &Shape) -> Value {
    let stages: Map<String, Value> =
        stages.iter().map(|planned| (planned.name.to_owned(), as_json(planned))).collect();
    let device = if shape.is_on_cpu() { "cpu" } else { "cuda" };
    json!({ "device": device, "prompt_tokens": shape.prompt_tokens(), "stages": stages })
}

fn as_json(planned: &Planned) -> Value {
    let Planned { need, settings, fits, .. } = planned;
    let fits: Map<String, Value> = fits
        .iter()
        .map(|(size_gb, fit)| {
            let fit = match fit {
                Ok(changes) => json!({"fits": true, "changes": changes}),
                Err(bytes) => json!({"fits": false, "needs_bytes": bytes}),
            };
            (format!("{size_gb}"), fit)
        })
        .collect();
    let phases: Map<String, Value> =
        need.phases.iter().map(|(name, bytes)| ((*name).to_owned(), json!(bytes))).collect();
    let (peak_phase, peak_bytes) = need.peak();
    json!({
        "settings": settings,
        "runtime_bytes": need.runtime,
        "weights_bytes": need.weights,
        "adapters_bytes": need.adapters,
        "optimiser_bytes": need.optimiser,
        "activations_bytes": need.activations,
        "kv_cache_bytes": need.kv_cache,
        "rollouts_bytes": need.rollouts,
        "phases_bytes": phases,
        "peak_phase": peak_phase,
        "peak_bytes": peak_bytes,
        "fits_gb": fits,
    })
}

/// As tables in Markdown.
pub fn text(stages: &[Planned], shape: &Shape) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with two places")]
    let gb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e9);
    let mut text = String::from(
        "| stage | runtime | weights | adapters | optimiser | activations | KV cache | rollouts | peak | in |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    for Planned { name, need, .. } in stages {
        let (phase, peak) = need.peak();
        let parts = [
            need.runtime,
            need.weights,
            need.adapters,
            need.optimiser,
            need.activations,
            need.kv_cache,
            need.rollouts,
            peak,
        ];
        let parts = parts.map(gb).join(" | ");
        text += &format!("| {} | {parts} | {phase} |\n", name);
    }
    text += "\n| stage |";
    for size_gb in GPU_SIZES_GB {
        text += &format!(" {size_gb} GB |");
    }
    text += "\n|---|---|---|---|---|\n";
    for Planned { name, fits, .. } in stages {
        text += &format!("| {} |", name);
        for (_, fit) in fits {
            text += &match fit {
                Ok(changes) if changes.is_empty() => " fits |".to_owned(),
                Ok(changes) => format!(" with {} |", changes.join(", ")),
                Err(bytes) => format!(" no: {} GB at least |", gb(*bytes)),
            };
        }
        text += "\n";
    }
    text += if shape.is_on_cpu() {
        "\nResident memory of the process, in GB.\n"
    } else {
        "\nMemory of the GPU, in GB: counted, not measured.\n"
    };
    text + &format!(
        "Prompts of {} tokens; other lengths are those at which the recipe cuts.\n",
        shape.prompt_tokens()
    )
}
