//! What is written, and what that does to what was there.

use arete_model::Tensor;
use arete_model::checkpoint::safetensors::SafetensorsFile;
use serde_json::json;

use crate::common::*;

#[test]
fn what_stands_under_the_name_of_an_output_is_set_aside() {
    let scratch = Scratch::new();
    let (base, adapter) = (golden("llama_untied"), golden("peft/causal"));
    let quantize = |output: &str| {
        let output = scratch.at(output);
        prints(&[
            "quantize",
            "--model",
            text(&golden("gradients/base")),
            "--output",
            text(&output),
        ]);
    };
    let mine = scratch.at("mine");
    fs_err::create_dir_all(mine.join("sub")).unwrap();
    fs_err::write(mine.join("sub/thesis.txt"), "thesis").unwrap();
    quantize("mine");
    assert_eq!(scratch.names(), ["mine", "mine.old-1"]);
    let kept = fs_err::read_to_string(scratch.at("mine.old-1/sub/thesis.txt")).unwrap();
    assert_eq!(kept, "thesis");
    // The same once more changes nothing and adds nothing.
    quantize("mine");
    assert_eq!(scratch.names(), ["mine", "mine.old-1"]);
    // A file, and a link to a directory.
    fs_err::write(scratch.at("file"), "thesis").unwrap();
    fs_err::os::unix::fs::symlink(scratch.at("mine.old-1"), scratch.at("link")).unwrap();
    let arguments = [
        "merge",
        "--model",
        text(&base),
        "--adapter",
        text(&adapter),
        "--dtype",
        "f32",
        "--output",
    ];
    for name in ["file", "link"] {
        prints(&[&arguments[..], &[text(&scratch.at(name))]].concat());
    }
    assert_eq!(scratch.names(), ["file", "file.old-1", "link", "link.old-1", "mine", "mine.old-1"]);
    assert_eq!(fs_err::read_to_string(scratch.at("file.old-1")).unwrap(), "thesis");
    assert_eq!(names(&scratch.at("mine.old-1")), ["sub"], "where the link led");
    // The source itself.
    let source = scratch.copy(&base, "source");
    prints(&[&["merge", "--model", text(&source)], &arguments[3..], &[text(&source)]].concat());
    assert!(names(&scratch.at("source.old-1")).contains(&"chat_template.jinja".to_owned()));
    assert_eq!(
        fs_err::read(scratch.at("source.old-1/model.safetensors")).unwrap(),
        fs_err::read(base.join("model.safetensors")).unwrap()
    );
}

#[test]
fn what_kills_left_is_swept_and_what_fails_leaves_nothing() {
    let scratch = Scratch::new();
    for name in [".merged.tmp-4711-0", ".packed.tmp-4711-0", ".other.tmp-4711-0"] {
        fs_err::create_dir(scratch.at(name)).unwrap();
        fs_err::write(scratch.at(name).join("half"), "h").unwrap();
    }
    let (base, adapter) = (golden("llama_untied"), golden("peft/causal"));
    let merged = scratch.at("merged");
    prints(&[
        "merge",
        "--model",
        text(&base),
        "--adapter",
        text(&adapter),
        "--output",
        text(&merged),
    ]);
    assert_eq!(scratch.names(), [".other.tmp-4711-0", ".packed.tmp-4711-0", "merged"]);
    // A number of the source that is none is found while it is written.
    let spoilt = scratch.copy(&golden("gradients/base"), "spoilt");
    spoil(&weights(&spoilt), "model.norm.weight", 3, f32::NAN);
    refuses(
        &["quantize", "--model", text(&spoilt), "--output", text(&scratch.at("packed"))],
        65,
        &["model.norm.weight", "element 3"],
    );
    assert_eq!(scratch.names(), [".other.tmp-4711-0", "merged", "spoilt"]);
}

#[test]
fn settings_of_generation_are_kept_and_what_is_not_the_models_is_not() {
    let scratch = Scratch::new();
    let base = scratch.copy(&golden("gradients/base"), "base");
    let settings = json!({
        "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3, "do_sample": true, "temperature": 0.6, "top_p": 0.9,
        "max_length": 4096, "repetition_penalty": 1.1, "transformers_version": "4.42.3",
    });
    fs_err::write(base.join("generation_config.json"), settings.to_string()).unwrap();
    let layers = object(&base.join("config.json"))["num_hidden_layers"].as_u64().unwrap();
    let (stray, buffer) = (
        format!("model.layers.{layers}.self_attn.q_proj.weight"),
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    );
    let more = [(stray.as_str(), &[64i64, 64][..]), (buffer, &[8i64][..])];
    let zeros =
        |size: &[i64]| Tensor::zeros(size, (arete_model::Kind::Float, arete_model::Device::Cpu));
    rewrite(&base, |_, tensor| Some(tensor), more.map(|(name, size)| (name, zeros(size))).into());
    let output = scratch.at("packed");
    prints(&["quantize", "--model", text(&base), "--output", text(&output)]);
    assert_eq!(json!(object(&output.join("generation_config.json"))), settings);
    let file = SafetensorsFile::open(&output.join("model.safetensors")).unwrap();
    let strangers: Vec<&str> =
        file.names().filter(|name| name.starts_with(&stray) || *name == buffer).collect();
    assert!(strangers.is_empty(), "{strangers:?}");

    // Without an end of text anywhere, none is made up.
    fs_err::remove_file(base.join("generation_config.json")).unwrap();
    edit(&base.join("config.json"), |config| {
        config.insert("eos_token_id".to_owned(), json!(null));
        config.insert("bos_token_id".to_owned(), json!(null));
    });
    let output = scratch.at("endless");
    prints(&["quantize", "--model", text(&base), "--output", text(&output)]);
    assert!(object(&output.join("generation_config.json")).is_empty());
    assert!(object(&output.join("config.json"))["eos_token_id"].is_null());
}
