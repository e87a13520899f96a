//! A server on the loopback interface that answers as a test wants.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// What to send back.
pub(crate) enum Answer {
    /// Status, extra headers, body.
    Http(u16, &'static str, String),
    /// Headers that promise more than comes.
    CutOff,
    /// Not a byte, as from a process that is killed.
    Nothing,
}

/// A running server.
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) requests: Arc<Mutex<Vec<Value>>>,
    pub(crate) most_at_once: Arc<AtomicUsize>,
}

/// Serves chat until the test process ends; any other path is not there. `answer` gets a request's number (from 0) and body.
pub(crate) fn serve(answer: impl Fn(usize, &Value) -> Answer + Send + Sync + 'static) -> Server {
    serve_paths(|_, _| Answer::Http(404, "", "no such path".to_owned()), answer)
}

/// [`serve`], and what another path answers to a body.
pub(crate) fn serve_paths(
    elsewhere: impl Fn(&str, &Value) -> Answer + Send + Sync + 'static,
    answer: impl Fn(usize, &Value) -> Answer + Send + Sync + 'static,
) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(Mutex::new(Vec::new()));
    let (at_once, most_at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (log, most) = (Arc::clone(&requests), Arc::clone(&most_at_once));
    let answer = Arc::new((elsewhere, answer));
    let number = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let (answer, log, number) =
                (Arc::clone(&answer), Arc::clone(&log), Arc::clone(&number));
            let (at_once, most) = (Arc::clone(&at_once), Arc::clone(&most));
            std::thread::spawn(move || {
                let Some((path, body)) = read(&stream) else { return };
                let (elsewhere, answer) = &*answer;
                if path != "/v1/chat/completions" {
                    return write(stream, elsewhere(&path, &body));
                }
                let now = at_once.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                log.lock().unwrap().push(body.clone());
                let reply = answer(number.fetch_add(1, Ordering::SeqCst), &body);
                at_once.fetch_sub(1, Ordering::SeqCst);
                write(stream, reply);
            });
        }
    });
    Server { url, requests, most_at_once }
}

fn read(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first).ok()?;
    let path = first.split(' ').nth(1)?.to_owned();
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
    Some((path, serde_json::from_slice(&body).ok()?))
}

fn write(mut stream: TcpStream, answer: Answer) {
    let text = match answer {
        Answer::Http(status, headers, body) => format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}Content-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        ),
        Answer::CutOff => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"choices\"".to_owned(),
        Answer::Nothing => String::new(),
    };
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.shutdown(Shutdown::Both);
}
