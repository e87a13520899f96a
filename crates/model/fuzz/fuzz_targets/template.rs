//! Any text as a chat template: compiled and rendered on a conversation within its budget, without a panic.
#![no_main]

use std::path::Path;

use arete_model::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let variables = vec![("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    if let Ok(template) = ChatTemplate::new(Path::new("fuzz.jinja"), source, variables) {
        let messages = [Message::system("Be kind."), Message::user("Hi"), Message::assistant("Hello.")];
        for add_generation_prompt in [false, true] {
            if let Ok(text) = template.render(&messages, add_generation_prompt) {
                assert!(text.len() <= 4 << 20, "the budget holds");
            }
        }
        let _ = template.fit(&messages);
    }
});
