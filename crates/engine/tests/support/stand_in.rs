//! A server with vLLM's contract (and SGLang's two endpoints) that answers by our own decoder over the tiny chat model, and does on
//! demand what a real one will not: wrong, stale, half-loaded and base weights, refusals, hangs, deaths. For tests of several crates.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use arete_chain::reward_model::sequence_scores;
use arete_model::adapter::{self, LoadedAdapter};
use arete_model::generate::{self, Options, Request, Sampling, Stream};
use arete_model::{
    Adapter, Batch, Device, Kind, LoadOptions, Model, SegmentIdx, Source, Tensor, logprobs,
    no_grad_guard, random,
};
use arete_records::FinishReason;
use serde_json::{Value, json};

/// Which weights an adapter gets that is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Weights {
    /// Those in its directory.
    #[default]
    Honest,
    /// Those of the one loaded before; of the first, the base's.
    Stale,
    /// None: the base answers.
    Base,
    /// The first half of the layers.
    Half,
    /// Noise on top.
    Wrong,
}

/// What the server does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Behaviour {
    /// So many adapters get their own weights before `weights` counts.
    pub(crate) honest_loads: usize,
    /// Which weights adapters get.
    pub(crate) weights: Weights,
    /// It was started without adapters at run time.
    pub(crate) has_no_adapters: bool,
    /// So many loads do not find the directory.
    pub(crate) unseen: usize,
    /// So many replies are refused with status 500.
    pub(crate) failing: usize,
    /// Replies never come.
    pub(crate) hangs: bool,
    /// After so many replies it is gone.
    pub(crate) dies_after: Option<usize>,
    /// Replies depend on when they are asked for.
    pub(crate) is_moody: bool,
    /// Log-probabilities are those before temperature.
    pub(crate) is_raw: bool,
    /// Scores are divided by this, if it is not 0.
    pub(crate) divisor: f64,
}

/// A running server; it ends with this.
pub(crate) struct StandIn {
    pub(crate) url: String,
    model: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    /// Path and body of every request.
    log: Mutex<Vec<(String, Value)>>,
    is_over: AtomicBool,
}

impl StandIn {
    /// Serves the model in a directory under the name `tiny`.
    pub(crate) fn serve(model: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut server =
            Self { url, model: model.to_owned(), shared: Arc::default(), thread: None };
        server.start(listener);
        server
    }

    fn start(&mut self, listener: TcpListener) {
        let (shared, model) = (Arc::clone(&self.shared), self.model.clone());
        shared.is_over.store(false, Ordering::SeqCst);
        self.thread = Some(std::thread::spawn(move || Desk::new(&model, shared).run(&listener)));
    }

    /// Changes what it does from now on.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.behaviour.lock().unwrap());
    }

    /// Ends it, as a kill would: adapters are forgotten.
    pub(crate) fn kill(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // Wakes it, if it waits.
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Starts it anew at the same address, without adapters.
    pub(crate) fn restart(&mut self) {
        self.kill();
        let address = self.url.trim_start_matches("http://");
        let listener = loop {
            match TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        self.start(listener);
    }

    /// Bodies of the requests to a path, so far.
    pub(crate) fn requests(&self, path: &str) -> Vec<Value> {
        let log = self.shared.log.lock().unwrap();
        log.iter().filter(|(to, _)| to == path).map(|(_, body)| body.clone()).collect()
    }

    /// Replies asked for so far.
    pub(crate) fn n_replies(&self) -> usize {
        let is_reply = |body: &Value| body.get("logprobs").is_some();
        self.requests("/v1/completions").iter().filter(|body| is_reply(body)).count()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The server's one thread.
struct Desk {
    model: Model,
    shared: Arc<Shared>,
    adapters: HashMap<String, (String, LoadedAdapter)>,
    /// Directory of the adapter loaded last.
    last: Option<String>,
    n_replies: usize,
    copies: tempfile::TempDir,
    n_copies: usize,
    /// Never answered.
    hanging: Vec<TcpStream>,
}

struct Answer(u16, String);

fn refused(status: u16, message: &str) -> Answer {
    let error = json!({"error": {"message": message, "type": "X", "param": null, "code": status}});
    Answer(status, error.to_string())
}

impl Desk {
    fn new(model: &Path, shared: Arc<Shared>) -> Self {
        let options = LoadOptions { device: Device::Cpu, dtype: Kind::Float, nf4: None };
        let model = Model::load(&Source::Directory(model.to_owned()), &options).unwrap();
        let (adapters, hanging, copies) =
            (HashMap::new(), Vec::new(), tempfile::tempdir().unwrap());
        Self { model, shared, adapters, last: None, n_replies: 0, copies, n_copies: 0, hanging }
    }

    fn run(mut self, listener: &TcpListener) {
        let _guard = no_grad_guard();
        for stream in listener.incoming() {
            if self.shared.is_over.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream else { return };
            let Some((path, body)) = read(&stream) else { continue };
            self.shared.log.lock().unwrap().push((path.clone(), body.clone()));
            let behaviour = *self.shared.behaviour.lock().unwrap();
            let is_reply = body.get("logprobs").is_some() || path == "/generate";
            if is_reply && behaviour.hangs {
                self.hanging.push(stream);
                continue;
            }
            if is_reply {
                self.n_replies += 1;
                if behaviour.dies_after.is_some_and(|n| self.n_replies > n) {
                    self.shared.behaviour.lock().unwrap().dies_after = None;
                    return; // and the connection breaks off
                }
            }
            let Answer(status, text) = self.answer(&path, &body, behaviour);
            write(stream, status, &text);
        }
    }

    fn answer(&mut self, path: &str, body: &Value, behaviour: Behaviour) -> Answer {
        let name = body["lora_name"].as_str().unwrap_or_default().to_owned();
        match path {
            "/v1/models" => {
                let adapter = |(name, (path, _)): (&String, &(String, LoadedAdapter))| json!({"id": name, "root": path, "parent": "tiny"});
                let mut cards = vec![json!({"id": "tiny", "root": "/models/tiny", "parent": null})];
                cards.extend(self.adapters.iter().map(adapter));
                Answer(200, json!({"object": "list", "data": cards}).to_string())
            }
            "/v1/load_lora_adapter" | "/load_lora_adapter" if !behaviour.has_no_adapters => {
                self.load(&name, body["lora_path"].as_str().unwrap_or_default(), behaviour)
            }
            "/v1/unload_lora_adapter" | "/unload_lora_adapter" if !behaviour.has_no_adapters => {
                match self.adapters.remove(&name) {
                    Some(_) => Answer(200, "Success".to_owned()),
                    None => refused(404, &format!("The lora adapter '{name}' cannot be found.")),
                }
            }
            "/v1/completions" => {
                let model = body["model"].as_str().unwrap_or_default();
                if model != "tiny" && !self.adapters.contains_key(model) {
                    return refused(404, &format!("The model `{model}` does not exist."));
                }
                self.complete(body, model, behaviour)
            }
            "/generate" => {
                let model = body["lora_path"].as_str().unwrap_or("tiny").to_owned();
                self.generate(body, &model)
            }
            "/classify" => self.classify(body, behaviour),
            _ => Answer(404, r#"{"detail":"Not Found"}"#.to_owned()),
        }
    }

    fn load(&mut self, name: &str, path: &str, mut behaviour: Behaviour) -> Answer {
        if self.adapters.contains_key(name) {
            return refused(400, &format!("The lora adapter '{name}' has already been loaded."));
        }
        let is_unseen = behaviour.unseen > 0;
        if is_unseen {
            self.shared.behaviour.lock().unwrap().unseen -= 1;
        }
        if behaviour.honest_loads > 0 && !is_unseen {
            self.shared.behaviour.lock().unwrap().honest_loads -= 1;
            behaviour.weights = Weights::Honest;
        }
        let device = Device::Cpu;
        let from = match behaviour.weights {
            Weights::Stale => self.last.clone().unwrap_or_else(|| path.to_owned()),
            _ => path.to_owned(),
        };
        let is_first = behaviour.weights == Weights::Stale && self.last.is_none();
        let loaded = adapter::load(Path::new(&from), name, &self.model.config, device);
        let Some(loaded) = loaded.ok().filter(|_| !is_unseen) else {
            let message = format!("Loading lora {name} failed: No adapter found for {path}");
            return refused(404, &message);
        };
        for (idx, (parameter, mut tensor)) in loaded.adapter.parameters().into_iter().enumerate() {
            let is_b = parameter.contains("lora_B");
            let is_dropped = match behaviour.weights {
                Weights::Base => true,
                Weights::Half => parameter.contains("layers.1."),
                Weights::Stale => is_first,
                Weights::Honest | Weights::Wrong => false,
            };
            if is_b && is_dropped {
                let _ = tensor.zero_();
            }
            if is_b && behaviour.weights == Weights::Wrong {
                let noise = random::normal(7, &format!("wrong {idx}"), tensor.numel(), 0.5);
                tensor.copy_(&(&tensor + Tensor::from_slice(&noise).view_as(&tensor)));
            }
        }
        // What a stale one answers with the next time. Its directory goes with the next adapter, so a copy is kept.
        if behaviour.weights != Weights::Stale {
            self.last = Some(self.kept(path));
        }
        self.adapters.insert(name.to_owned(), (path.to_owned(), loaded));
        Answer(200, format!("Success: LoRA adapter '{name}' added successfully."))
    }

    /// A copy of an adapter's directory.
    fn kept(&mut self, path: &str) -> String {
        let copy = self.copies.path().join(self.n_copies.to_string());
        self.n_copies += 1;
        fs_err::create_dir(&copy).unwrap();
        for entry in fs_err::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            fs_err::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        copy.to_str().unwrap().to_owned()
    }

    fn adapter(&self, model: &str) -> Option<&Adapter> {
        self.adapters.get(model).map(|(_, loaded)| &loaded.adapter)
    }

    /// log P of each token of the prompt but the first.
    fn values(&self, model: &str, token_ids: &[i64]) -> Vec<f64> {
        let batch = Batch::from_sequences(&[token_ids]);
        let first = batch.rows(SegmentIdx(0)).start;
        let rows: Vec<usize> = (1..token_ids.len()).map(|at| first + at).collect();
        let hidden = self.model.decoder.forward(&batch, self.adapter(model)).unwrap();
        let found =
            logprobs::of_rows(&self.model.decoder, &hidden, &batch, &rows, 1.0, false).unwrap();
        Vec::try_from(found.logprob.to_kind(Kind::Double)).unwrap()
    }

    fn complete(&mut self, body: &Value, model: &str, behaviour: Behaviour) -> Answer {
        let token_ids = ids(&body["prompt"]);
        if body.get("prompt_logprobs").is_some() {
            let value = |(id, value): (&i64, f64)| json!({id.to_string(): {"logprob": value}});
            let values = self.values(model, &token_ids);
            let rest = token_ids[1..].iter().zip(values).map(value);
            let all: Vec<Value> = std::iter::once(Value::Null).chain(rest).collect();
            return Answer(200, json!({"choices": [{"prompt_logprobs": all}]}).to_string());
        }
        if behaviour.failing > 0 {
            self.shared.behaviour.lock().unwrap().failing -= 1;
            return refused(500, "EngineCore encountered an issue");
        }
        let n_replies = self.n_replies as u64;
        let mood = if behaviour.is_moody { n_replies } else { 0 };
        let sampling = Sampling {
            temperature: body["temperature"].as_f64().unwrap(),
            top_k: body["top_k"].as_u64().unwrap() as usize,
            top_p: body["top_p"].as_f64().unwrap(),
        };
        let max_new_tokens = body["max_tokens"].as_u64().unwrap() as usize;
        let stop_ids = ids(&body["stop_token_ids"]);
        let seed = body["seed"].as_u64().unwrap();
        let (sampled, logprobs, reason) =
            self.draw(model, token_ids.clone(), sampling, seed, mood, max_new_tokens, stop_ids);
        let logprobs = if behaviour.is_raw {
            let whole = [&token_ids[..], &sampled].concat();
            self.values(model, &whole).split_off(token_ids.len() - 1)
        } else {
            logprobs
        };
        let choice = json!({
            "token_ids": sampled, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason,
        });
        Answer(200, json!({"choices": [choice]}).to_string())
    }

    fn generate(&mut self, body: &Value, model: &str) -> Answer {
        let token_ids = ids(&body["input_ids"]);
        let settings = &body["sampling_params"];
        if body.get("logprob_start_len").is_some() {
            let values = self.values(model, &token_ids).into_iter().map(Value::from);
            let values = std::iter::once(Value::Null).chain(values);
            let all: Vec<Value> =
                token_ids.iter().zip(values).map(|(id, value)| json!([value, id, null])).collect();
            return Answer(200, json!({"meta_info": {"input_token_logprobs": all}}).to_string());
        }
        let sampling = Sampling::at(settings["temperature"].as_f64().unwrap());
        let max_new_tokens = settings["max_new_tokens"].as_u64().unwrap() as usize;
        let seed = settings["sampling_seed"].as_u64().unwrap();
        let stop_ids = ids(&settings["stop_token_ids"]);
        let (sampled, logprobs, reason) =
            self.draw(model, token_ids, sampling, seed, 0, max_new_tokens, stop_ids);
        let entries: Vec<Value> =
            sampled.iter().zip(logprobs).map(|(id, value)| json!([value, id, null])).collect();
        let meta = json!({"finish_reason": {"type": reason}, "output_token_logprobs": entries});
        Answer(200, json!({"output_ids": sampled, "meta_info": meta}).to_string())
    }

    #[expect(clippy::too_many_arguments, reason = "what a request says")]
    fn draw(
        &self,
        model: &str,
        prompt_ids: Vec<i64>,
        sampling: Sampling,
        seed: u64,
        mood: u64,
        max_new_tokens: usize,
        stop_ids: Vec<i64>,
    ) -> (Vec<i64>, Vec<f64>, &'static str) {
        let stream = Stream { seed, prompt: 0, sample: mood };
        let request = Request::new(prompt_ids, vec![stream], max_new_tokens);
        let options = Options::new(sampling, stop_ids);
        let (decoder, tokenizer) = (&self.model.decoder, Some(&self.model.tokenizer));
        let adapter = self.adapter(model);
        let mut out =
            generate::complete(decoder, tokenizer, adapter, &[request], &options).unwrap();
        let reply = out.remove(0).remove(0);
        let reason = match reply.finish_reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        (reply.token_ids, reply.logprobs.into_iter().map(f64::from).collect(), reason)
    }

    fn classify(&self, body: &Value, behaviour: Behaviour) -> Answer {
        let model = body["model"].as_str().unwrap_or_default();
        let Some((_, loaded)) = self.adapters.get(model) else {
            return refused(404, &format!("The model `{model}` does not exist."));
        };
        let Some(head) = &loaded.head else { return refused(500, "no head") };
        let inputs: Vec<Vec<i64>> = body["input"].as_array().unwrap().iter().map(ids).collect();
        let decoder = &self.model.decoder;
        let scores = sequence_scores(decoder, Some(&loaded.adapter), head, &inputs, 1024).unwrap();
        let divisor = if behaviour.divisor == 0.0 { 1.0 } else { behaviour.divisor };
        let entry = |(index, score): (usize, f64)| json!({"index": index, "label": "LABEL_0", "probs": [score / divisor], "num_classes": 1});
        let data: Vec<Value> = scores.into_iter().enumerate().map(entry).collect();
        Answer(200, json!({"object": "list", "data": data}).to_string())
    }
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().into_iter().flatten().map(|id| id.as_i64().unwrap()).collect()
}

fn read(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    if body.is_empty() {
        return Some((path, Value::Null));
    }
    Some((path, serde_json::from_slice(&body).ok()?))
}

fn write(mut stream: TcpStream, status: u16, body: &str) {
    let text = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
}
