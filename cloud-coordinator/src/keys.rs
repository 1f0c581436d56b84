//! `cloud-coordinator keys`: who may sign, on a coordinator or on a machine that is never online.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Subcommand, ValueEnum};

use crate::{
    clock,
    delivery::signing::{
        Edit, Lifetimes, RoleName as Role, Signing, generate, public_from_json, public_of,
        sign_root,
    },
};

/// A role of The Update Framework.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum RoleName {
    /// Says who may sign for all roles.
    Root,
    /// Signs which models there are.
    Targets,
    /// Signs what belongs together.
    Snapshot,
    /// Signs what is newest.
    Timestamp,
}

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Root => Self::Root,
            RoleName::Targets => Self::Targets,
            RoleName::Snapshot => Self::Snapshot,
            RoleName::Timestamp => Self::Timestamp,
        }
    }
}

/// Keys and signatures. All but `generate` and `sign` work on the coordinator's data folder, also while it runs.
///
/// Two of three keys for the root, kept offline:
///   keys generate root --to USB           (on three machines; copy the .pub files)
///   keys propose --add root:A.pub --add root:B.pub --add root:C.pub --threshold root=2 --remove root:ID > next.json
///   keys sign next.json --with USB/root-….key --previous root.json   (on two of them, and with the old key)
///   keys install next.json
#[derive(Subcommand)]
#[command(verbatim_doc_comment)]
pub(crate) enum KeysCommand {
    /// Shows the roles, their keys, how many must sign and when the signatures expire.
    Status,
    /// Prints the root that devices are given.
    Root,
    /// Makes a new key and puts it in the place of all keys of a role. Needs the root's keys here.
    Rotate {
        /// The role.
        role: RoleName,
    },
    /// Makes a key; its public half goes beside it, as .pub.
    Generate {
        /// What it is for.
        role: RoleName,
        /// The folder.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// Prints the next root with these changes, not signed by anybody.
    Propose {
        /// A key that may sign: `ROLE:FILE.pub`
        #[arg(long, value_name = "ROLE:FILE")]
        add: Vec<String>,
        /// A key that may not sign any more: `ROLE:ID`, the beginning of the identity is enough.
        #[arg(long, value_name = "ROLE:ID")]
        remove: Vec<String>,
        /// How many keys must sign: `ROLE=NUMBER`
        #[arg(long, value_name = "ROLE=N")]
        threshold: Vec<String>,
    },
    /// Adds signatures to a proposed root, in its file.
    Sign {
        /// The proposed root.
        file: PathBuf,
        /// Files of private keys.
        #[arg(long, value_name = "FILE", required = true)]
        with: Vec<PathBuf>,
        /// The root that is in force: its keys must sign the next one, too.
        #[arg(long, value_name = "FILE")]
        previous: Option<PathBuf>,
    },
    /// Puts a signed root in force.
    Install {
        /// The signed root.
        file: PathBuf,
    },
}

fn role(text: &str) -> anyhow::Result<Role> {
    let name = RoleName::from_str(text, true);
    let name = name.map_err(|_| {
        anyhow::anyhow!("{text:?} is no role: root, targets, snapshot or timestamp")
    })?;
    Ok(name.into())
}

fn pair(text: &str, by: char) -> anyhow::Result<(Role, &str)> {
    let (name, value) = text
        .split_once(by)
        .with_context(|| format!("{text:?} is not ROLE{by}…"))?;
    Ok((role(name)?, value))
}

/// Does what `keys …` asks for, with the registry of the coordinator in `data`.
pub(crate) async fn run(data: &Path, command: KeysCommand) -> anyhow::Result<()> {
    let read =
        |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    match command {
        KeysCommand::Generate { role, to } => {
            std::fs::create_dir_all(&to).with_context(|| format!("making {}", to.display()))?;
            let (file, public) = generate(&to, role.into())?;
            let beside = file.with_extension("pub");
            std::fs::write(&beside, serde_json::to_vec_pretty(&public)?)
                .with_context(|| format!("writing {}", beside.display()))?;
            println!("{}\n{}", file.display(), beside.display());
            return Ok(());
        }
        KeysCommand::Sign {
            file,
            with,
            previous,
        } => {
            let previous = previous.as_deref().map(read).transpose()?;
            let signed = sign_root(&read(&file)?, previous.as_deref(), &with).await?;
            std::fs::write(&file, signed).with_context(|| format!("writing {}", file.display()))?;
            println!("{} is signed", file.display());
            return Ok(());
        }
        _ => {}
    }
    let folder = data.join("releases");
    anyhow::ensure!(
        folder.is_dir(),
        "there is no coordinator's data in {}: name its folder with --data",
        data.display()
    );
    let now = clock::now_ms();
    let signing = Signing::open(&folder, Lifetimes::default(), now).await?;
    match command {
        KeysCommand::Status => {
            let status = signing.status()?;
            for role in &status.roles {
                let days = (role.expires_ms - now) / 86_400_000;
                println!(
                    "{:<10} version {:<4} {} of {} keys must sign, signatures expire in {days} days",
                    role.role.to_string(),
                    role.version,
                    role.threshold,
                    role.keys.len()
                );
                for key in &role.keys {
                    let place = if key.here { "here" } else { "elsewhere" };
                    println!("             {}  {place}", key.id);
                }
            }
            println!("{} models are published", status.targets);
            for unused in &status.unused {
                println!("may sign nothing: {unused}");
            }
        }
        KeysCommand::Root => print!("{}", String::from_utf8_lossy(&signing.root()?)),
        KeysCommand::Rotate { role } => {
            let version = signing.rotate(role.into(), now).await?;
            println!("root {version} is in force");
        }
        KeysCommand::Propose {
            add,
            remove,
            threshold,
        } => {
            let mut edits = Vec::new();
            for text in &add {
                let (role, file) = pair(text, ':')?;
                let path = Path::new(file);
                let public = match path.extension().is_some_and(|e| e == "key") {
                    true => public_of(path)?,
                    false => public_from_json(&read(path)?)?,
                };
                edits.push(Edit::Add(role, public));
            }
            for text in &remove {
                let (role, id) = pair(text, ':')?;
                edits.push(Edit::Remove(role, id.to_owned()));
            }
            for text in &threshold {
                let (role, number) = pair(text, '=')?;
                edits.push(Edit::Threshold(
                    role,
                    number.parse().context("a threshold is a number")?,
                ));
            }
            print!(
                "{}",
                String::from_utf8_lossy(&signing.propose(&edits, now)?)
            );
        }
        KeysCommand::Install { file } => {
            let version = signing.install_root(&read(&file)?, now).await?;
            println!("root {version} is in force");
        }
        KeysCommand::Generate { .. } | KeysCommand::Sign { .. } => {}
    }
    Ok(())
}
