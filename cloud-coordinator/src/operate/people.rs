//! `user …` and `token …`

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, bail};
use axum::http::Method;
use clap::Subcommand;
use serde_json::{Value, json};

use super::{Where, each, text};
use crate::{exchange::in_query, trust::Role};

/// People.
#[derive(Subcommand)]
pub(crate) enum UserCommand {
    /// Adds a user; the password is asked for, or is the first line of the input.
    ///
    /// Example: cloud-coordinator user add ana --role labeller --site plant-3
    Add {
        /// The name: 1 to 63 of a-z, 0-9, - and _.
        name: String,
        /// What it may do.
        #[arg(long, value_enum, default_value = "viewer")]
        role: Role,
        /// The only site that it may see.
        #[arg(long)]
        site: Option<String>,
    },
    /// Lists the users.
    List,
    /// Gives a user another password, which ends its sessions.
    Passwd {
        /// The name.
        name: String,
    },
    /// Keeps a user from logging in, and ends its sessions.
    Disable {
        /// The name.
        name: String,
        /// Lets it log in again.
        #[arg(long)]
        undo: bool,
    },
}

/// API tokens.
#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a token for a program, and prints it. It is never shown again.
    ///
    /// Example: cloud-coordinator token create "nightly report" --role viewer --days 365
    Create {
        /// What it is for.
        label: String,
        /// What it may do.
        #[arg(long, value_enum, default_value = "viewer")]
        role: Role,
        /// The only site that it may see.
        #[arg(long)]
        site: Option<String>,
        /// Days until it runs out.
        #[arg(long, default_value_t = 90)]
        days: i64,
    },
    /// Lists the tokens that count.
    List,
    /// Takes a token back.
    Revoke {
        /// Its number, as the list shows it.
        id: String,
    },
}

/// Turns what is typed on and off; without a terminal, or without `stty`, nothing happens.
fn echo(on: bool) {
    let argument = if on { "echo" } else { "-echo" };
    // Not being able to hide it is no reason not to ask.
    let _ = std::process::Command::new("stty").arg(argument).status();
}

fn password() -> anyhow::Result<String> {
    let input = std::io::stdin();
    let asked = input.is_terminal();
    if asked {
        eprint!("password: ");
        std::io::stderr().flush()?;
        echo(false);
    }
    let mut line = String::new();
    let read = input.lock().read_line(&mut line);
    if asked {
        echo(true);
        eprintln!();
    }
    read.context("reading the password")?;
    let password = line.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        bail!("no password was given");
    }
    Ok(password.to_owned())
}

fn shown(user: &Value) {
    let off = if user["disabled"] == true {
        "  disabled"
    } else {
        ""
    };
    let site = user["site"].as_str().unwrap_or("all sites");
    let (name, role) = (text(user, "name"), text(user, "role"));
    println!("{name:<24} {role:<9} {site}{off}");
}

/// Does what `user …` asks for.
pub(crate) async fn user(place: &Where, command: UserCommand) -> anyhow::Result<()> {
    let (name, change) = match command {
        UserCommand::Add { name, role, site } => {
            let new = json!({"name": name, "role": role, "site": site, "password": password()?});
            shown(&place.ask(Method::POST, "/users", Some(new)).await?);
            return Ok(());
        }
        UserCommand::List => {
            let users = place.ask(Method::GET, "/users", None).await?;
            if each(&users).count() == 0 {
                println!("there is no user; open the setup link that the coordinator has logged");
            }
            each(&users).for_each(shown);
            return Ok(());
        }
        UserCommand::Passwd { name } => (name, json!({"password": password()?})),
        UserCommand::Disable { name, undo } => (name, json!({"disabled": !undo})),
    };
    let path = format!("/users/{}", in_query(&name));
    shown(&place.ask(Method::PATCH, &path, Some(change)).await?);
    Ok(())
}

/// Does what `token …` asks for.
pub(crate) async fn token(place: &Where, command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create {
            label,
            role,
            site,
            days,
        } => {
            let new = json!({"label": label, "role": role, "site": site, "days": days});
            let made = place.ask(Method::POST, "/tokens", Some(new)).await?;
            eprintln!("token {}, shown only now:", text(&made, "id"));
            println!("{}", text(&made, "token"));
        }
        TokenCommand::List => {
            let tokens = place.ask(Method::GET, "/tokens", None).await?;
            for token in each(&tokens) {
                let site = token["site"].as_str().unwrap_or("all sites");
                let ends = jiff::Timestamp::from_millisecond(
                    token["expires_ms"].as_i64().unwrap_or_default(),
                )?;
                println!(
                    "{}  {:<16} {:<9} {site:<16} until {ends:.0}  {}",
                    text(token, "id"),
                    text(token, "owner"),
                    text(token, "role"),
                    text(token, "label"),
                );
            }
        }
        TokenCommand::Revoke { id } => {
            let path = format!("/tokens/{}", in_query(&id));
            place.ask(Method::DELETE, &path, None).await?;
            println!("it does not count any more");
        }
    }
    Ok(())
}
