//! Prompts, Constitutional-AI demonstrations, conversations, judged preference pairs.
