//! Answers a question: `reply MODEL QUESTION`.
use arete_model::{Error, LoadOptions, Message, Model, Source};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().expect("two arguments: MODEL QUESTION");
    let model = Model::load(&Source::parse(&next())?, &LoadOptions::default())?;
    println!("{}", model.reply(&[Message::user(next())])?);
    Ok(())
}
