//! Servers, and who asks them: honest ones and others.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    Digest,
    offload::{Offer, serve::Refusal},
};
use models::Picture;
use tokio::{
    io::{AsyncWriteExt, duplex},
    time::{sleep, timeout},
};
use tokio_util::compat::TokioAsyncReadCompatExt;

use super::{Alone, BOUND, BOX, Other, Room, big, bundle, drawn, engine, server};
use crate::offload::{
    courier::Roads,
    serve::Server,
    wire::{INFER, MAX_IMAGE, Question, Reply, ask},
};

/// Asks a server over a pipe, as somebody who keeps to the protocol.
async fn asked(server: &Arc<Server<Alone>>, question: &Question, picture: &[u8]) -> Reply {
    let room = Room(Other::Server(Arc::clone(server)));
    let stream = room.open(BOX, INFER).await.unwrap();
    timeout(BOUND, ask(stream, question, picture))
        .await
        .unwrap()
        .unwrap()
}

async fn offers_of(server: &Arc<Server<Alone>>) -> Vec<Offer> {
    loop {
        match asked(server, &Question::Offers, &[]).await {
            Reply::Offers(offers) if !offers.is_empty() => return offers,
            Reply::Offers(_) => sleep(Duration::from_millis(50)).await,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_asker_gets_nothing_and_takes_nothing_from_others() {
    let (server, _, counters) = server(&big(), None);
    let model = offers_of(&server).await[0].digest;
    let run = |model, bytes: usize| Question::Run {
        model,
        deadline_ms: 9_000,
        bytes: u32::try_from(bytes).unwrap(),
    };
    // Time has to be saved first.
    sleep(Duration::from_secs(2)).await;
    let picture = drawn(2);
    let none = asked(&server, &run(Digest([1; 32]), picture.len()), &picture).await;
    assert_eq!(none, Reply::Refused(Refusal::NoSuchModel));
    let huge = asked(&server, &run(model, MAX_IMAGE + 1), &[0; 100]).await;
    assert_eq!(huge, Reply::Refused(Refusal::BadPicture));
    let garbage = asked(&server, &run(model, 5_000), &[7; 5_000]).await;
    assert_eq!(garbage, Reply::Refused(Refusal::BadPicture));
    // A small file of many pixels.
    let mut bomb = Vec::new();
    let black = image::GrayImage::new(9_000, 5_000);
    black
        .write_to(
            &mut std::io::Cursor::new(&mut bomb),
            image::ImageFormat::Png,
        )
        .unwrap();
    assert!(bomb.len() < MAX_IMAGE);
    let refused = asked(&server, &run(model, bomb.len()), &bomb).await;
    assert_eq!(refused, Reply::Refused(Refusal::BadPicture));
    // A picture that is cut off in the middle.
    let cut = &picture[..picture.len() / 2];
    let refused = asked(&server, &run(model, cut.len()), cut).await;
    assert_eq!(refused, Reply::Refused(Refusal::BadPicture));
    let hurried = Question::Run {
        model,
        deadline_ms: 0,
        bytes: 10,
    };
    assert_eq!(
        asked(&server, &hurried, &[0; 10]).await,
        Reply::Refused(Refusal::TooLate)
    );
    // Some who open streams and say nothing, half a question, or no picture; and hold on to them.
    let mut open = Vec::new();
    for said in [
        &b""[..],
        b"\x00",
        b"\x00\x20{",
        b"\xff\xff",
        b"\x00\x08\"offers\"",
    ] {
        let (mut ours, theirs) = duplex(1_024);
        ours.write_all(said).await.unwrap();
        let server = Arc::clone(&server);
        open.push((
            ours,
            tokio::spawn(async move { server.serve(theirs.compat()).await }),
        ));
    }
    let begin = tokio::time::Instant::now();
    let answer = loop {
        match asked(&server, &run(model, picture.len()), &picture).await {
            Reply::Answer(answer) => break answer,
            other => assert_eq!(other, Reply::Refused(Refusal::ShareUsed)),
        }
        assert!(begin.elapsed() < BOUND);
        sleep(Duration::from_millis(100)).await;
    };
    let large = engine("steel");
    let own = large.infer(&Picture::decode(&picture).unwrap()).unwrap();
    assert_eq!(
        (answer.label, answer.model.as_str()),
        (own.label, large.id())
    );
    assert_eq!(counters.offload.served.get(), 1);
    for (ours, served) in open {
        timeout(BOUND, served).await.unwrap().unwrap();
        drop(ours);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_that_is_none_is_not_offered() {
    for serve in ["/nowhere".into(), bundle("backbone")] {
        let (server, ..) = server(&format!("serve = {serve:?}"), None);
        sleep(Duration::from_millis(1_500)).await;
        assert_eq!(
            asked(&server, &Question::Offers, &[]).await,
            Reply::Offers(vec![])
        );
    }
}
