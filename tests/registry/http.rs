//! A coordinator that answers as it likes.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    time::Duration,
};

use super::*;
use edge_agent::update::registry::{Http, MAX_FILE_BYTES};

/// What is answered instead of one file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trick {
    None,
    Endless,
    Short,
    Long,
    Redirect,
    Fails,
    Hangs,
    Drips,
}

fn answer(
    mut stream: TcpStream,
    repository: &Path,
    trick: Trick,
    victim: &str,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let request = String::from_utf8(request).unwrap();
    let path = request
        .split(' ')
        .nth(1)
        .unwrap()
        .strip_prefix("/tuf/")
        .unwrap()
        .to_owned();
    let bytes = fs::read(repository.join(&path)).ok();
    let trick = if path.ends_with(victim) {
        trick
    } else {
        Trick::None
    };
    let length = bytes.as_ref().map_or(0, Vec::len);
    let head = |length: usize| {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n")
    };
    match (trick, bytes) {
        (Trick::None, None) => {
            // It says that it closes the connection, or the next request may be sent into one that is being closed.
            stream.write_all(
                b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            )
        }
        (Trick::None, Some(bytes)) => {
            stream.write_all(head(length).as_bytes())?;
            stream.write_all(&bytes)
        }
        (Trick::Endless, bytes) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")?;
            stream.write_all(&bytes.unwrap_or_default())?;
            loop {
                stream.write_all(&[b' '; 65536])?;
            }
        }
        (Trick::Short, bytes) => {
            stream.write_all(head(length + 10).as_bytes())?;
            stream.write_all(&bytes.unwrap_or_default())
        }
        (Trick::Long, bytes) => {
            stream.write_all(head(MAX_FILE_BYTES as usize * 100).as_bytes())?;
            stream.write_all(&bytes.unwrap_or_default())
        }
        (Trick::Redirect, _) => {
            let to = request.split(' ').nth(1).unwrap();
            let head = format!(
                "HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes())
        }
        (Trick::Fails, _) => {
            stream.write_all(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        }
        (Trick::Hangs, _) => stream.read_exact(&mut [0]),
        (Trick::Drips, _) => {
            stream.write_all(head(1000).as_bytes())?;
            loop {
                stream.write_all(b" ")?;
                // A wait that ends when the other side goes.
                stream.set_read_timeout(Some(Duration::from_millis(20)))?;
                if matches!(stream.read(&mut [0]), Ok(0)) {
                    return Ok(());
                }
            }
        }
    }
}

fn serve(repository: PathBuf, trick: Trick, victim: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let repository = repository.clone();
            std::thread::spawn(move || answer(stream.unwrap(), &repository, trick, victim));
        }
    });
    format!("http://{address}/tuf/")
}

fn device(world: &World, name: &str, address: &str) -> Registry {
    let second = Duration::from_secs(1);
    let source = Http::patient(address, [second, second / 2, second]);
    let pinned = world.signing.first_root().unwrap();
    Registry::new(&pinned, world.dir.path().join(name), source).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_misbehaves_gives_one_clear_error() {
    let world = World::new().await;
    world.publish("1").await;
    let honest = serve(world.repository(), Trick::None, "-");
    accepts(&mut device(&world, "honest", &honest), &["1"], NOW).await;
    let tricks = [
        Trick::Endless,
        Trick::Short,
        Trick::Long,
        Trick::Redirect,
        Trick::Fails,
        Trick::Hangs,
        Trick::Drips,
    ];
    // The next root, too: an answer that is no answer does not mean that there is none.
    for victim in [
        "2.root.json",
        "timestamp.json",
        "snapshot.json",
        "targets.json",
        "det/1.json",
    ] {
        for trick in tricks {
            let address = serve(world.repository(), trick, victim);
            let mut device = device(&world, "device", &address);
            let got = match device.refresh(NOW).await {
                Ok(_) if victim == "det/1.json" => device.release("det", "1", NOW).await.map(drop),
                other => other.map(drop),
            };
            let error = got.unwrap_err();
            let fits = match trick {
                Trick::Endless | Trick::Long => {
                    matches!(
                        error,
                        VerifyError::TooLarge(_) | VerifyError::Unreachable { .. }
                    )
                }
                _ => matches!(error, VerifyError::Unreachable { .. }),
            };
            assert!(fits, "{victim} {trick:?}: {error:?}");
            assert!(
                trick != Trick::Endless || matches!(error, VerifyError::TooLarge(_)),
                "{error:?}"
            );
        }
    }
    // Nobody there.
    let error = device(&world, "device", "http://127.0.0.1:9/")
        .refresh(NOW)
        .await
        .unwrap_err();
    assert!(
        matches!(error, VerifyError::Unreachable { .. }),
        "{error:?}"
    );
    accepts(&mut device(&world, "device", &honest), &["1"], NOW).await;
}
