//! What the stage refuses, and in which words.

use std::path::Path;

use crate::common::{
    config, random_reward, save_reward, tiny_chat, tiny_model, write_prompts, write_rewards,
};
use arete_model::{ScalarHead, Tensor};
use arete_ppo::prompts::Prompts;
use arete_ppo::{Config, TrainInputs, train};
use arete_records::{Aspect, Message, Split, parquet, prompt_id, rows::PromptRow};

fn refusal(config: &Config, dir: &Path) -> String {
    refused(config, dir).to_string()
}

fn refused(config: &Config, dir: &Path) -> anyhow::Error {
    let inputs = TrainInputs {
        prompts: dir.join("prompts"),
        rewards: Some(dir.join("reward")),
        named_rewards: Vec::new(),
        constitution: None,
        yardstick: None,
        output: dir.join("out"),
    };
    train(config, &inputs).unwrap_err()
}

#[test]
fn a_reward_model_of_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = tiny_model();
    write_prompts(dir.path());
    write_rewards(dir.path(), &model);
    let (adapter, head) = random_reward(&model, 9);
    model.base_sha256 = "0123456789abcdef".repeat(4);
    let motivation = dir.path().join("reward/motivation");
    fs_err::remove_dir_all(&motivation).unwrap();
    save_reward(&motivation, &model, &adapter, Some(&head));
    let message = refusal(&config(&[]), dir.path());
    assert!(
        message.contains("adapter's base: expected tiny-chat (sha256 0123456789ab)"),
        "{message}"
    );
}

#[test]
fn reward_models_of_another_tokenizer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    fs_err::create_dir(&base).unwrap();
    for entry in fs_err::read_dir(tiny_chat()).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), base.join(entry.file_name())).unwrap();
    }
    // The same weights, but two tokens have changed their numbers.
    let path = base.join("tokenizer.json");
    let mut tokenizer: serde_json::Value =
        serde_json::from_slice(&fs_err::read(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocabulary["a"].clone(), vocabulary["b"].clone());
    vocabulary.insert("a".to_owned(), b);
    vocabulary.insert("b".to_owned(), a);
    fs_err::write(&path, tokenizer.to_string()).unwrap();

    write_prompts(dir.path());
    write_rewards(dir.path(), &tiny_model());
    let message = refusal(&config(&["--model", base.to_str().unwrap()]), dir.path());
    assert!(
        message.contains("adapter's base: expected tiny-chat (sha256 ")
            && message.contains("got a model with sha256 "),
        "{message}"
    );
}

#[test]
fn a_reward_model_without_a_reading_rule_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(dir.path());
    write_rewards(dir.path(), &tiny_model());
    fs_err::remove_file(dir.path().join("reward/motivation/reading.json")).unwrap();
    let error = refused(&config(&[]), dir.path());
    assert!(error.to_string().contains("made by an older version"), "{error}");
    let class = error.chain().find_map(arete_training::class_of);
    assert_eq!(class, Some(arete_records::Class::Data)); // exit code 65
}

#[test]
fn a_reward_model_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_prompts(dir.path());
    write_rewards(dir.path(), &tiny_model());
    // One that was begun is one to wait for.
    let consequence = dir.path().join("reward/consequence");
    fs_err::remove_dir_all(consequence.join("adapter")).unwrap();
    fs_err::write(consequence.join("stage.json"), "{}").unwrap();
    let message = refusal(&config(&[]), dir.path());
    assert!(message.contains("reward/consequence/adapter"), "{message}");
    fs_err::remove_dir_all(dir.path().join("reward")).unwrap();
    let message = refusal(&config(&[]), dir.path());
    assert!(message.contains("reward/action/adapter") && message.contains("none"), "{message}");
    // The answer alone is asked for, and nobody reads it.
    write_rewards(dir.path(), &tiny_model());
    fs_err::remove_dir_all(dir.path().join("reward/action")).unwrap();
    let message = refusal(&config(&["--rollout", "answer"]), dir.path());
    assert!(message.contains("a reward model of a turn that is asked for"), "{message}");
}

#[test]
fn a_missing_head_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    write_prompts(dir.path());
    write_rewards(dir.path(), &model);
    let (adapter, _) = random_reward(&model, 9);
    let motivation = dir.path().join("reward/motivation");
    fs_err::remove_dir_all(&motivation).unwrap();
    save_reward(&motivation, &model, &adapter, None);
    let message = refusal(&config(&[]), dir.path());
    let wanted = "motivation/adapter: head: expected an adapter with a score head (modules_to_save), found none";
    assert!(message.contains(wanted), "{message}");
}

#[test]
fn scores_that_are_no_numbers_or_all_the_same_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    write_prompts(dir.path());
    let dir = dir.path();
    for (fill, with_stats, wanted) in [
        (f64::NAN, true, "score.weight: expected finite numbers, found NaN or an infinity"),
        (
            0.0,
            false,
            "scores of the action reward model on the reference: expected scores that differ between conversations, got 0 for all 12",
        ),
        (
            0.0,
            true,
            "scores of the action reward model in the first rollout: expected scores that differ between conversations",
        ),
    ] {
        if dir.join("reward").exists() {
            fs_err::remove_dir_all(dir.join("reward")).unwrap();
        }
        for (seed, aspect) in (0..).zip(Aspect::SHIPPED) {
            let (adapter, mut head) = random_reward(&model, seed);
            if aspect == Aspect::ACTION {
                head = ScalarHead { weight: Tensor::full_like(&head.weight, fill) };
            }
            let at = dir.join("reward").join(aspect.name());
            save_reward(&at, &model, &adapter, Some(&head));
            if with_stats {
                let base = &model.base_sha256;
                let stats = format!(
                    r#"{{"mean": 0.5, "std": 2.0, "n": 9, "split": "validation", "base_sha256": "{base}"}}"#
                );
                fs_err::write(at.join("score_stats.json"), stats).unwrap();
            }
        }
        let message = refusal(&config(&["--rollout", "answer"]), dir);
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn statistics_of_another_base_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    write_prompts(dir.path());
    let rewards = write_rewards(dir.path(), &model);
    for (stats, wanted) in [
        (
            r#"{"mean": 0.5, "std": 2.0, "n": 9, "split": "validation", "base_sha256": "other"}"#,
            "base_sha256: expected statistics of this base, found other",
        ),
        (
            r#"{"mean": 0.5, "std": 0.0, "n": 9, "split": "validation", "base_sha256": "other"}"#,
            "std: expected a standard deviation above 0, found 0",
        ),
        ("{}", "expected score statistics"),
    ] {
        fs_err::write(rewards.join("action/score_stats.json"), stats).unwrap();
        let message = refusal(&config(&[]), dir.path());
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    write_prompts(dir.path());
    write_rewards(dir.path(), &model);
    let prompt = vec![Message::user("so long ".repeat(1200))];
    let id = prompt_id(&prompt);
    let row =
        PromptRow { prompt_id: id.clone(), split: Split::Train, source: "test".to_owned(), prompt };
    let file = dir.path().join("prompts/prompts.parquet");
    parquet::write(&file, std::slice::from_ref(&row)).unwrap();
    let message = refusal(&config(&[]), dir.path());
    assert!(message.contains(&format!("prompt {id}: expected at most")), "{message}");
    assert!(message.contains("(2048 of the model less"), "{message}");

    // Among others it is left out and named, as the conversations stage leaves it out.
    write_prompts(dir.path());
    let mut rows: Vec<PromptRow> = parquet::read(&file).unwrap();
    let n_train = rows.iter().filter(|row| row.split == Split::Train).count();
    rows.insert(0, row.clone());
    parquet::write(&file, &rows).unwrap();
    let chat = model.chat().unwrap();
    let read = Prompts::read(&dir.path().join("prompts"), &chat, 2048, 100).unwrap();
    assert_eq!((read.train.len(), read.left_out.len()), (n_train, 1));
    assert_eq!(read.left_out[0].item, id);

    let row = PromptRow { split: Split::Test, ..row };
    parquet::write(&file, &[row]).unwrap();
    let message = refusal(&config(&[]), dir.path());
    assert!(message.contains("at least one prompt of the train split"), "{message}");
}
