//! Three samples of one prompt, each printed when it ends: `several MODEL QUESTION`.
use arete_model::generate::{Generator, Options, Request, Sampling, Stream};
use arete_model::{Error, LoadOptions, Message, Model, Source};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().expect("two arguments: MODEL QUESTION");
    let model = Model::load(&Source::parse(&next())?, &LoadOptions::default())?;
    let prompt = model.chat()?.render_prompt(&[Message::user(next())])?;
    let streams = (0..3).map(|sample| Stream { seed: 7, prompt: 0, sample }).collect();
    let requests = [Request::new(prompt, streams, 24)];
    let options = Options::new(Sampling::at(1.0), model.stop_ids()?);
    for ended in Generator::new(&model.decoder, Some(&model.tokenizer), None, &requests, &options)? {
        println!("{}", model.chat()?.reply_text(&ended?.completion.token_ids)?);
    }
    Ok(())
}
