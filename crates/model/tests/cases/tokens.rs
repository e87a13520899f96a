//! Token ids: those of llama.cpp for GGUF files, those of transformers for directories.

use arete_model::{Chat, Checkpoint, Message, Source, Tokenizer};
use serde_json::{Value, json};

use crate::common::*;

fn ids_of_llama_cpp() -> Value {
    serde_json::from_slice(&fs_err::read(golden("llama_cpp/ids.json")).unwrap()).unwrap()
}

fn of_gguf(name: &str) -> Tokenizer {
    let source = Source::Gguf(golden(&format!("llama_cpp/{name}.gguf")));
    Checkpoint::open(&source).unwrap().tokenizer().unwrap()
}

#[test]
fn gguf_files_have_the_ids_of_llama_cpp_and_a_directory_those_of_both() {
    let golden_ids = ids_of_llama_cpp();
    let texts: Vec<String> = serde_json::from_value(golden_ids["texts"].clone()).unwrap();
    let mut n_files = 0;
    for (name, expected) in golden_ids["ids"].as_object().unwrap() {
        let tokenizer = match name.strip_prefix("directory ") {
            Some(name) => Tokenizer::from_directory(&golden("llama_cpp").join(name)).unwrap(),
            None => of_gguf(name),
        };
        for (text, expected) in texts.iter().zip(expected.as_array().unwrap()) {
            let expected: Vec<i64> = serde_json::from_value(expected.clone()).unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{name}: {text:?}");
        }
        n_files += 1;
    }
    assert!(n_files >= 16);
    assert_eq!(golden_ids["ids"]["spm"], golden_ids["ids"]["directory spm"]);
}

/// What a tokenizer decodes is the text again, spaces at both ends of it included.
#[test]
fn sentencepiece_of_gguf_decodes_as_the_directory_does() {
    let (file, directory) =
        (of_gguf("spm"), Tokenizer::from_directory(&golden("llama_cpp/spm")).unwrap());
    for text in ["hello", " hello", "hello the<|im_end|> user ", "é 😀"] {
        let ids = file.encode(text, false).unwrap();
        assert_eq!(file.decode(&ids).unwrap(), directory.decode(&ids).unwrap(), "{text:?}");
        let spans = file.decode_with_special(&ids).unwrap();
        assert_eq!(spans, directory.decode_with_special(&ids).unwrap(), "{text:?}");
    }
}

#[test]
fn an_end_of_turn_needs_no_name() {
    let messages = [Message::user("hello"), Message::assistant("the")];
    let template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}\
                    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let scratch = Scratch::new();
    // Declared, but not called special; called an end by nobody but the template.
    for eos in ["<|im_end|>", "<|endoftext|>"] {
        let model = scratch.copy(&tiny_chat(), "model");
        edit(&model.join("tokenizer.json"), |json| {
            for token in json["added_tokens"].as_array_mut().unwrap() {
                if token["content"] == "<|im_end|>" {
                    token["special"] = json!(false);
                }
            }
        });
        edit(&model.join("tokenizer_config.json"), |config| {
            config.insert("eos_token".to_owned(), json!(eos));
            config.insert("chat_template".to_owned(), json!(template));
        });
        let _ = fs_err::remove_file(model.join("chat_template.jinja"));
        let tokenizer = Tokenizer::from_directory(&model).unwrap();
        let template = tokenizer.template().unwrap();
        let chat = Chat::new(&tokenizer, &template).unwrap();
        assert_eq!(chat.end_of_turn_id(), 2);
        let rendered = chat.render(&messages).unwrap();
        assert_eq!(rendered.token_ids.iter().filter(|id| **id == 2).count(), 2);
        assert_eq!(
            chat.reply_text(&[79, 80, 2, 81]).unwrap(),
            tokenizer.decode(&[79, 80]).unwrap()
        );
        assert_eq!(tokenizer.is_special(2), eos == "<|im_end|>");
    }
    // In GGUF llama.cpp knows it by its name.
    assert!(of_gguf("user_defined_end").is_special(5));
}

#[test]
fn the_three_files_are_read_as_transformers_reads_them() {
    let golden: Value =
        serde_json::from_slice(&fs_err::read(golden("tokenizer_files.json")).unwrap()).unwrap();
    let texts: Vec<String> = serde_json::from_value(golden["texts"].clone()).unwrap();
    let scratch = Scratch::new();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let base = match case["base"].as_str().unwrap() {
            "tiny-chat" => tiny_chat(),
            _ => crate::common::golden("llama_cpp/spm"),
        };
        let model = scratch.copy(&base, name);
        edit(&model.join("tokenizer.json"), |json| {
            let removed = case["removed"].as_array().cloned().unwrap_or_default();
            for token in &removed {
                json["model"]["vocab"].as_object_mut().unwrap().remove(token.as_str().unwrap());
            }
            let added = json["added_tokens"].as_array_mut().unwrap();
            added.retain(|token| !removed.contains(&token["content"]));
            for token in added {
                if let Some(special) = case["special"].get(token["content"].as_str().unwrap()) {
                    token["special"] = special.clone();
                }
            }
        });
        edit(&model.join("tokenizer_config.json"), |config| {
            for (key, value) in case["config"].as_object().into_iter().flatten() {
                config.insert(key.clone(), value.clone());
            }
            config.retain(|_, value| !value.is_null());
        });
        if case["map"].is_object() {
            fs_err::write(model.join("special_tokens_map.json"), case["map"].to_string()).unwrap();
        }
        let check = |tokenizer: &Tokenizer, how: &str| {
            let special = |id: Option<i64>| json!(id.and_then(|id| tokenizer.token(id)));
            let found = json!({
                "bos": special(tokenizer.bos_id()), "eos": special(tokenizer.eos_id()), "unk": special(tokenizer.unk_id()),
            });
            assert_eq!(found, case["tokens"], "{name} {how}");
            for (i, text) in texts.iter().enumerate() {
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(json!(ids), case["ids"][i], "{name} {how}: {text:?}");
                assert_eq!(
                    json!(tokenizer.decode(&ids).unwrap()),
                    case["decoded"][i],
                    "{name} {how}: {text:?}"
                );
            }
        };
        let tokenizer = Tokenizer::from_directory(&model).unwrap();
        check(&tokenizer, "read");
        // What is written for a merged model says the same.
        let written = scratch.at(&format!("{name} written"));
        fs_err::create_dir(&written).unwrap();
        tokenizer.save(&written).unwrap();
        check(&Tokenizer::from_directory(&written).unwrap(), "written and read");
    }
}

/// The ids that AutoTokenizer of transformers 5.23 gives over tiny-chat with these changes.
#[test]
fn tokens_named_beside_the_tokenizer_only_are_added_as_transformers_adds_them() {
    let scratch = Scratch::new();
    let text = "hello the world yo hello";
    let one = [512, 263, 398, 286, 306, 81, 223, 512];
    let (config, map, added) =
        ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json");
    for (i, (file, change, ids)) in [
        (config, json!({"additional_special_tokens": ["hello", "<|im_start|>"]}), one),
        (config, json!({"extra_special_tokens": ["hello", "<|im_start|>"]}), one),
        (config, json!({"extra_special_tokens": {"h_token": "hello"}}), one),
        (config, json!({"foo_token": "hello"}), one),
        (map, json!({"additional_special_tokens": ["hello"]}), one),
        (added, json!({"hello": 512}), one),
        (
            config,
            json!({"sep_token": "hello", "cls_token": "yo", "mask_token": "world"}),
            [512, 263, 223, 514, 223, 513, 223, 512],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let model = scratch.copy(&tiny_chat(), &i.to_string());
        edit(&model.join(file), |map| map.extend(change.as_object().unwrap().clone()));
        let written = scratch.at(&format!("{i} written"));
        fs_err::create_dir(&written).unwrap();
        Tokenizer::from_directory(&model).unwrap().save(&written).unwrap();
        for directory in [&model, &written] {
            let tokenizer = Tokenizer::from_directory(directory).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{change}");
            assert_eq!(tokenizer.is_special(512), file != added, "{change}");
        }
    }
    // All at once, in this order; templates know those that have names.
    let model = scratch.copy(&tiny_chat(), "all");
    let names = json!({"extra_special_tokens": {"z_token": "hello", "b": "yo"}, "y_token": "lead"});
    edit(&model.join(config), |map| map.extend(names.as_object().unwrap().clone()));
    let more = json!({"x_token": "world", "additional_special_tokens": ["qq"]});
    edit(&model.join(map), |map| map.extend(more.as_object().unwrap().clone()));
    fs_err::write(model.join("chat_template.jinja"), "{{ x_token }} {{ b }} {{ q_token }}")
        .unwrap();
    let tokenizer = Tokenizer::from_directory(&model).unwrap();
    let expected = ["world", "lead", "hello", "yo", "qq"].map(str::to_owned);
    assert_eq!((512..517).filter_map(|id| tokenizer.token(id)).collect::<Vec<_>>(), expected);
    assert_eq!(tokenizer.template().unwrap().render(&[], false).unwrap(), "world yo ");
    // What is no list of tokens, and an id that it cannot have.
    for (file, change, named) in [
        (config, json!({"extra_special_tokens": "hello"}), "extra_special_tokens: expected a list"),
        (config, json!({"extra_special_tokens": {"z": ["hello"]}}), "extra_special_tokens"),
        (map, json!({"additional_special_tokens": [3]}), "additional_special_tokens"),
        (added, json!({"hello": 600}), "expected 512, the id it has"),
    ] {
        let model = scratch.copy(&tiny_chat(), "refused");
        let _ = fs_err::remove_file(model.join(map));
        edit(&model.join(file), |map| map.extend(change.as_object().unwrap().clone()));
        let error = Tokenizer::from_directory(&model).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains(file), "{error}");
    }
}

/// transformers keeps a template by each name, and goes by files before the list in the settings.
#[test]
fn copies_keep_templates_of_other_names() {
    let scratch = Scratch::new();
    let copied = |model: &std::path::Path, name: &str| {
        let written = scratch.at(name);
        fs_err::create_dir(&written).unwrap();
        let tokenizer = Tokenizer::from_directory(model).unwrap();
        tokenizer.save(&written).unwrap();
        assert_eq!(Tokenizer::from_directory(&written).unwrap().template().unwrap().source(), "x");
        written
    };
    let list = json!([{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}]);
    let model = scratch.copy(&tiny_chat(), "list");
    fs_err::remove_file(model.join("chat_template.jinja")).unwrap();
    edit(&model.join("tokenizer_config.json"), |config| {
        config.insert("chat_template".to_owned(), list.clone());
    });
    let written = copied(&model, "list written");
    assert_eq!(object(&written.join("tokenizer_config.json"))["chat_template"], list);
    assert!(!written.join("chat_template.jinja").exists(), "it would go before the list");
    // Files go before the list.
    fs_err::write(model.join("chat_template.jinja"), "x").unwrap();
    let files = model.join("additional_chat_templates");
    fs_err::create_dir(&files).unwrap();
    fs_err::write(files.join("rag.jinja"), "z").unwrap();
    let written = copied(&model, "files written");
    let other = fs_err::read(written.join("additional_chat_templates/rag.jinja")).unwrap();
    assert_eq!(other, b"z");
    assert_eq!(object(&written.join("tokenizer_config.json"))["chat_template"], json!("x"));
    fs_err::write(files.join("default.jinja"), "x").unwrap();
    fs_err::write(model.join("chat_template.jinja"), "w").unwrap();
    copied(&model, "default written");
}

/// Too few rows are harmless until a text has one of the tokens.
#[test]
fn a_token_without_a_row_of_the_embedding_is_the_models_fault() {
    let scratch = Scratch::new();
    let model = scratch.copy(&tiny_chat(), "model");
    edit(&model.join("added_tokens.json"), |added| {
        drop(added.insert("hello".to_owned(), json!(512)))
    });
    logprobs(&scratch, &model, &json!({"text": "the world"}), &[]);
    let lines = scratch.line(&json!({"text": "hello"}));
    let arguments = ["logprobs", "--model", text(&model), "--jsonl", text(&lines)];
    let words = ["tokenizer.json: token \"hello\": expected an id below 512", "found 512", "WARN"];
    refuses(&arguments, 65, &words);
}

/// A vocabulary with a hole where the listed token should be: transformers gives it another id without a word.
#[test]
fn a_listed_token_that_cannot_have_its_id_is_refused() {
    let scratch = Scratch::new();
    let model = scratch.copy(&tiny_chat(), "model");
    edit(&model.join("tokenizer_config.json"), |config| {
        let token = json!({"content": "<|new|>", "special": true, "normalized": false});
        config.insert("added_tokens_decoder".to_owned(), json!({ "9000": token }));
    });
    let error = Tokenizer::from_directory(&model).unwrap_err().to_string();
    assert!(error.contains("<|new|>") && error.contains("save_pretrained"), "{error}");
}

#[test]
fn a_pattern_that_cuts_seldom_did_not_give_up() {
    let scratch = Scratch::new();
    let long = "the hello ".repeat(600);
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    for pattern in ["\\d", "[0-9]", "\n"] {
        let model = scratch.copy(&tiny_chat(), "model");
        edit(&model.join("tokenizer.json"), |json| {
            json["pre_tokenizer"] =
                json!({"type": "Sequence", "pretokenizers": [split(pattern), bytes]});
        });
        let tokenizer = Tokenizer::from_directory(&model).unwrap();
        let ids = tokenizer.encode(&long, false).unwrap();
        // What the library itself gives for it: one word, merged as far as it goes.
        let own = tokenizers::Tokenizer::from_file(model.join("tokenizer.json")).unwrap();
        let expected: Vec<i64> = own
            .encode(long.as_str(), false)
            .unwrap()
            .get_ids()
            .iter()
            .map(|id| i64::from(*id))
            .collect();
        assert_eq!(ids, expected, "{pattern}");
    }
    // SentencePiece with digits apart.
    let model = scratch.copy(&golden("llama_cpp/spm"), "spm");
    edit(&model.join("tokenizer.json"), |json| json["pre_tokenizer"] = split("[0-9]"));
    let ids = Tokenizer::from_directory(&model).unwrap().encode(&long, false).unwrap();
    assert!(ids.len() >= 1200, "{}", ids.len());
}

#[test]
fn one_part_of_a_split_gguf_is_named() {
    let error =
        Checkpoint::open(&Source::Gguf(golden("llama_cpp/split.gguf"))).unwrap_err().to_string();
    assert!(error.contains("part 1 of 2") && error.contains("llama-gguf-split --merge"), "{error}");
}
