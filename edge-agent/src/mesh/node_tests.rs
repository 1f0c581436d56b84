//! Nodes among themselves, and with somebody who asks too much.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::{futures::AsyncWriteExt, swarm::SwarmEvent};
use mesh_core::meeting::{Meeting, Place};

use super::*;
use crate::mesh::names::id;
use crate::mesh::testing::{Quiet, members, rosters, until};

#[test]
fn whoever_was_known_before_the_roster_ran_out_is_seen_again_at_once() {
    let members = members(3);
    let all: Vec<_> = (0..3)
        .map(|n| Quiet::start(&members, n, &[0, 1, 2], rosters(&members)))
        .collect();
    until("they see each other", || {
        all[0].sees(&members, &[1, 2]) && all[1].sees(&members, &[0, 2])
    });
    // Nobody has anything new to say meanwhile.
    let roster = all[0].rosters.newest();
    all[0].rosters.replace(None);
    until("it knows nobody any more", || all[0].sees(&members, &[]));
    let began = tokio::time::Instant::now();
    all[0].rosters.replace(roster);
    until("it sees the others again", || {
        all[0].sees(&members, &[1, 2])
    });
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn a_neighbour_that_is_written_down_is_met_however_late_it_comes() {
    let members = members(3);
    let first = Quiet::start(&members, 0, &[1, 2], rosters(&members));
    let second = Quiet::start(&members, 1, &[], rosters(&members));
    until("two see each other", || {
        first.sees(&members, &[1]) && second.sees(&members, &[0])
    });
    until("it is said that the third was not reached", || {
        let status = first.status();
        let place = status.places.iter().find(|p| p.failure.is_some());
        place.is_some_and(|p| p.written && p.address == members[2].address().to_string())
    });
    // Nobody else knows of it, and it knows of nobody.
    let third = Quiet::start(&members, 2, &[], rosters(&members));
    until("the third is met", || {
        first.sees(&members, &[1, 2]) && third.sees(&members, &[0, 1])
    });
    assert!(first.status().places.iter().all(|p| p.failure.is_none()));
}

#[test]
fn where_the_coordinator_says_that_others_are_they_are_met() {
    let members = members(2);
    let first = Quiet::start(&members, 0, &[], rosters(&members));
    let second = Quiet::start(&members, 1, &[], rosters(&members));
    let own = second.rosters.meeting().own();
    until("it is known where the second is", || {
        own.borrow().as_str() == members[1].address().to_string()
    });
    let place = |device: &str, n: usize| Place {
        device: device.parse().unwrap(),
        address: members[n].address(),
    };
    let meeting = Meeting {
        v: 1,
        // Itself, nobody on the roster, and the second.
        at: vec![place("d1", 0), place("d9", 1), place("d2", 1)],
    };
    let said = meeting.encode().unwrap();
    first.rosters.meeting().heard(&said).unwrap();
    until("they see each other", || {
        first.sees(&members, &[1]) && second.sees(&members, &[0])
    });
    assert_eq!(first.status().places.len(), 1);
}

/// Asks for the roster as often as it can, reads nothing for a while, and counts then what had been sent.
#[test]
fn the_roster_is_sent_once_however_often_it_is_asked_for() {
    const QUESTIONS: usize = 1_000;
    let members = members(2);
    let rosters = rosters(&members);
    let signed = "x".repeat(20_000);
    rosters.sign_for_test(&signed);
    let node = Quiet::start(&members, 0, &[], rosters);
    let sent = Arc::new(AtomicUsize::new(0));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let key = members[1].key().clone();
        let transport = tcp::tokio::Transport::new(tcp::Config::default())
            .upgrade(Version::V1)
            .authenticate(noise::Config::new(&key).unwrap())
            .multiplex(yamux::Config::default())
            .boxed();
        let behaviour = libp2p_stream::Behaviour::new();
        let mut control = behaviour.new_control();
        let settings = libp2p::swarm::Config::with_tokio_executor()
            .with_idle_connection_timeout(Duration::from_secs(60));
        let local = key.public().to_peer_id();
        let mut swarm = Swarm::new(transport, behaviour, local, settings);
        let victim = id(&members[0].peer).unwrap();
        let address = multiaddress(members[0].address());
        let counted = Arc::clone(&sent);
        let asking = async move {
            let mut stream = loop {
                match control
                    .open_stream(victim, StreamProtocol::new(PRESENCE))
                    .await
                {
                    Ok(stream) => break stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            };
            let question = wire::version(0);
            for _ in 0..QUESTIONS {
                stream.write_all(&question).await.unwrap();
            }
            // Its own answer to this one is the last of all answers.
            stream.write_all(&wire::version(u64::MAX)).await.unwrap();
            stream.flush().await.unwrap();
            loop {
                match wire::read(&mut stream).await.unwrap().unwrap() {
                    Came::Roster(text) => {
                        assert_eq!(text, signed);
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    // One when the link is new, and one that was asked for.
                    Came::Version(_) if counted.load(Ordering::Relaxed) > 0 => break,
                    _ => {}
                }
            }
        };
        let turning = async {
            swarm.dial(address.clone()).unwrap();
            loop {
                // It may not listen yet.
                if let SwarmEvent::OutgoingConnectionError { .. } = swarm.select_next_some().await {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let _ = swarm.dial(address.clone());
                }
            }
        };
        tokio::select! {
            () = asking => {}
            () = turning => {}
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("no answer"),
        }
    });
    assert_eq!(sent.load(Ordering::Relaxed), 1);
    drop(node.running);
}
