//! A device's connection to the broker, as small as ten thousand of them in one process must be.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use rumqttc::{Packet, Publish, QoS, mqttbytes::Error as MqttError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// A connection is made, or a message written, within this, or it is over.
pub(super) const STALL: Duration = Duration::from_secs(60);
/// A wish is far smaller.
const MAX_PACKET: usize = 64 * 1024;

/// See the module.
pub(super) struct Wire {
    stream: TcpStream,
    input: BytesMut,
    /// What is written next.
    pub(super) output: BytesMut,
    last_id: u16,
}

impl Wire {
    /// Before CONNECT.
    pub(super) async fn open(broker: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(broker).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            input: BytesMut::new(),
            output: BytesMut::new(),
            last_id: 0,
        })
    }

    /// The next packet. Nothing is lost if it is not waited for to the end.
    pub(super) async fn packet(&mut self) -> anyhow::Result<Packet> {
        loop {
            match Packet::read(&mut self.input, MAX_PACKET) {
                Ok(packet) => return Ok(packet),
                Err(MqttError::InsufficientBytes(_)) => {}
                Err(error) => return Err(error.into()),
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                bail!("the broker closed the connection");
            }
        }
    }

    /// For a packet that is answered.
    pub(super) fn next_id(&mut self) -> u16 {
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        self.last_id
    }

    /// Adds a retained message to what is written next. Its acknowledgement is not waited for: a connection that
    /// fails says everything again.
    pub(super) fn retain(&mut self, topic: &str, payload: Vec<u8>) -> anyhow::Result<()> {
        let mut publish = Publish::from_bytes(topic, QoS::AtLeastOnce, Bytes::from(payload));
        publish.retain = true;
        publish.pkid = self.next_id();
        publish.write(&mut self.output)?;
        Ok(())
    }

    /// Writes what is ready.
    pub(super) async fn flush(&mut self) -> anyhow::Result<()> {
        if !self.output.is_empty() {
            timeout(STALL, self.stream.write_all(&self.output))
                .await
                .context("the broker reads too slowly")??;
            self.output.clear();
        }
        Ok(())
    }
}
