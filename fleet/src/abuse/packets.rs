//! MQTT as the enemy speaks it: byte by byte, since a library refuses to write what a broker has to refuse. And how it comes in.

use std::io;

use tokio::{io::AsyncReadExt, net::TcpStream};
use tokio_rustls::client::TlsStream;

use super::{Enemy, SOON, hear, shove};

/// A packet of this kind.
pub(super) fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    let mut left = body.len();
    loop {
        let digit = (left % 128) as u8;
        left /= 128;
        out.push(if left > 0 { digit | 0x80 } else { digit });
        if left == 0 {
            break;
        }
    }
    out.extend(body);
    out
}

pub(super) fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], text].concat()
}

/// CONNECT with this id, a last will on that topic, a name and a password.
pub(super) fn connect(id: &str, will: Option<&str>, login: Option<(&str, &str)>) -> Vec<u8> {
    connect_with(id, will.map(|topic| (topic, &b"offline"[..])), login, 60)
}

/// The same with any last will, and a keep-alive in seconds.
pub(super) fn connect_with(
    id: &str,
    will: Option<(&str, &[u8])>,
    login: Option<(&str, &str)>,
    keep_alive: u16,
) -> Vec<u8> {
    let mut flags = 0x02;
    let mut rest = text(id);
    if let Some((topic, word)) = will {
        // At QoS 1, retained.
        flags |= 0x04 | 0x08 | 0x20;
        rest.extend([text(topic), text(word)].concat());
    }
    if let Some((name, password)) = login {
        flags |= 0xc0;
        rest.extend([text(name), text(password)].concat());
    }
    let head = [&text("MQTT")[..], &[4, flags], &keep_alive.to_be_bytes()].concat();
    packet(0x10, &[head, rest].concat())
}

pub(super) fn publish(topic: impl AsRef<[u8]>, flags: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = text(topic);
    if flags & 0x06 != 0 {
        body.extend(id.to_be_bytes());
    }
    body.extend(payload);
    packet(0x30 | flags, &body)
}

pub(super) fn subscribe(id: u16, filters: impl IntoIterator<Item = String>) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    for filter in filters {
        body.extend(text(filter));
        body.push(1);
    }
    packet(0x82, &body)
}

pub(super) const DISCONNECT: [u8; 2] = [0xe0, 0];

impl Enemy {
    /// Says this as nobody in particular, and hears the end.
    pub(super) async fn say(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut stream = self.tls(self.mqtt, &self.nobody).await?;
        shove(&mut stream, bytes).await;
        hear(&mut stream, SOON).await;
        Ok(())
    }

    /// In as a device.
    pub(super) async fn inside(&self) -> io::Result<TlsStream<TcpStream>> {
        let mut stream = self.tls(self.mqtt, &self.device).await?;
        shove(&mut stream, &connect("", None, None)).await;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        Ok(stream)
    }

    /// In as a subscriber.
    pub(super) async fn listening(&self) -> io::Result<TlsStream<TcpStream>> {
        self.listening_for(60).await
    }

    /// The same with a keep-alive in seconds; 0 is none.
    pub(super) async fn listening_for(&self, keep_alive: u16) -> io::Result<TlsStream<TcpStream>> {
        let mut stream = self.tls(self.mqtt, &self.nobody).await?;
        let login = (self.login.0.as_str(), self.login.1.as_str());
        shove(
            &mut stream,
            &connect_with("", None, Some(login), keep_alive),
        )
        .await;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        Ok(stream)
    }

    /// Says this as a device, says goodbye, and hears the end.
    pub(super) async fn misbehave(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let mut stream = self.inside().await?;
        if shove(&mut stream, bytes).await {
            shove(&mut stream, &DISCONNECT).await;
        }
        hear(&mut stream, SOON).await;
        Ok(())
    }

    /// Says more, as a device, than a queue holds, to whoever listens to it.
    pub(super) async fn tell_itself(&self) -> anyhow::Result<()> {
        let mut stream = self.inside().await?;
        let (topic, body) = (self.own("cam0/image"), vec![b'x'; 60_000]);
        for n in 1..=500 {
            if !shove(&mut stream, &publish(&topic, 0x02, n, &body)).await {
                break;
            }
        }
        shove(&mut stream, &DISCONNECT).await;
        hear(&mut stream, SOON).await;
        Ok(())
    }

    pub(super) fn own(&self, rest: &str) -> String {
        format!("lacewing/v1/{}/{}/{rest}", self.name.0, self.name.1)
    }
}
