//! The command line: arguments → configuration → start → signal → stop.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use mesh_core::Name;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    Config, Coordinator, adopt, api, broker,
    broker::Product,
    config,
    config::ConfigErrors,
    exchange::{Format, in_query, send},
    keys::{self, KeysCommand},
    operate::{
        self, AuditCommand, DeviceCommand, EraseCommand, HOW, ModelCommand, RolloutCommand,
        SettingsCommand, SubscriberCommand, TokenCommand, UserCommand, Where,
    },
};

/// Takes in what devices report, keeps it, and shows it.
#[derive(Parser)]
#[command(name = "cloud-coordinator", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the coordinator until it is told to stop.
    Serve(Settings),
    /// Looks at a configuration without running it.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Brings a folder of labelled images to a running coordinator.
    Import(Import),
    /// Models: list them, make a bundle of your own one, bring one, publish one.
    Model {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: ModelCommand,
    },
    /// Brings models to the devices in stages, and back.
    Rollout {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: RolloutCommand,
    },
    /// Devices: who may come in, what they run, and what one of them is to run.
    Device {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: DeviceCommand,
    },
    /// Erases samples everywhere: here, and on the devices that may still have them.
    Erase {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: EraseCommand,
    },
    /// A broker that is another program: the files that tell it who may do what.
    #[command(subcommand)]
    Broker(BrokerCommand),
    /// Subscribers: who may listen on the broker without being a device.
    Subscriber {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: SubscriberCommand,
    },
    /// Settings of devices: a part of their configuration, set from here.
    Settings {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: SettingsCommand,
    },
    /// People who may log in.
    User {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: UserCommand,
    },
    /// What programs show instead of a password.
    Token {
        #[command(flatten)]
        place: Where,
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Whether the log of who did what is as it was written.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Who may sign models.
    Keys {
        /// The coordinator's data folder.
        #[arg(
            long,
            value_name = "DIR",
            env = "LACEWING_COORDINATOR_DATA",
            default_value = "lacewing-data",
            global = true
        )]
        data: PathBuf,
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// Prints the description of the API as OpenAPI in JSON.
    Openapi,
    /// Tries a model and prints what was found: how a running coordinator tries one that it does not know.
    #[command(name = models::TRY_MODEL, hide = true)]
    TryModel {
        /// The bundle's folder.
        dir: PathBuf,
    },
    /// Makes a bundle of somebody's file: how `model import` reads one that it does not know.
    #[command(name = adopt::MAKE_BUNDLE, hide = true)]
    MakeBundle {
        /// The folder with the request.
        dir: PathBuf,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Says whether the configuration can be used, and everything that is wrong with it.
    Check(Settings),
}

#[derive(Subcommand)]
enum BrokerCommand {
    /// Writes configuration, rights, certificate, key and list of revoked certificates for the broker into a folder. Works
    /// on the data folder, also while the coordinator runs. Run it again to renew the certificate.
    ///
    /// Example: cloud-coordinator broker rules --broker mqtts://broker.example --for mosquitto --to /etc/mosquitto/lacewing
    #[command(verbatim_doc_comment)]
    Rules {
        #[command(flatten)]
        settings: Settings,
        /// Which broker; by default broker.rules_for of the configuration.
        #[arg(long = "for", value_enum, value_name = "BROKER")]
        product: Option<Product>,
        /// The folder, as the broker sees it; by default broker.rules of the configuration.
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct Import {
    /// The task, a-z, 0-9, - and _; it is made if it is new.
    task: Name,
    /// The folder.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// How its classes are written down.
    #[arg(long, value_enum)]
    format: Format,
    /// Puts the images into the holdout: only ever measured with, never trained with.
    #[arg(long)]
    holdout: bool,
    /// Who brings them.
    #[arg(long, env = "USER")]
    author: String,
    #[command(flatten)]
    place: Where,
}

#[derive(clap::Args)]
struct Settings {
    /// The configuration; without it everything runs on loopback.
    #[arg(long, value_name = "FILE", env = "LACEWING_COORDINATOR_CONFIG")]
    config: Option<PathBuf>,
    /// The folder of the database.
    #[arg(long, value_name = "DIR", env = "LACEWING_COORDINATOR_DATA")]
    data: Option<PathBuf>,
    /// Where the API and the page are served: 127.0.0.1:8443, without TLS 127.0.0.1:8080.
    #[arg(long, value_name = "ADDR", env = "LACEWING_COORDINATOR_HTTP")]
    http: Option<SocketAddr>,
    /// Where the embedded broker listens: 127.0.0.1:8883, without TLS 127.0.0.1:1883.
    #[arg(long, value_name = "ADDR", env = "LACEWING_COORDINATOR_MQTT")]
    mqtt: Option<SocketAddr>,
    /// An external broker, mqtts://HOST:PORT.
    #[arg(
        long,
        value_name = "URL",
        env = "LACEWING_COORDINATOR_BROKER",
        conflicts_with = "mqtt"
    )]
    broker: Option<String>,
    /// Plain HTTP and MQTT, on loopback only: everybody on this machine is believed.
    #[arg(long)]
    no_tls: bool,
}

impl Settings {
    /// The file, changed by the environment and the command line.
    fn read(self) -> Result<Config, ConfigErrors> {
        let mut config = Config::read(self.config.as_deref(), self.no_tls)?;
        let mut errors = Vec::new();
        if let Some(data) = self.data {
            config.data = data;
        }
        if let Some(http) = self.http {
            config.http = http;
        }
        if let Some(mqtt) = self.mqtt {
            config.broker.listen = mqtt;
            config.broker.url = None;
        }
        if let Some(url) = self.broker {
            match config::broker_url(&url) {
                Ok(url) => config.broker.url = Some(url),
                Err(error) => errors.push(format!("--broker: {error}")),
            }
        }
        errors.extend(config.contradictions());
        if errors.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors(errors))
        }
    }
}

/// Runs the program with these arguments, of which the first is its own name.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are not mistakes.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cloud-coordinator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::TryModel { dir } => {
            models::try_here(&dir);
            Ok(())
        }
        Command::MakeBundle { dir } => {
            adopt::make_here(&dir);
            Ok(())
        }
        Command::Openapi => {
            println!("{}", api::openapi()?);
            Ok(())
        }
        Command::Config(ConfigCommand::Check(settings)) => {
            settings.read()?;
            println!("the configuration can be used");
            Ok(())
        }
        Command::Import(import) => waiting(bring(&import)),
        Command::Model { place, command } => waiting(operate::model(&place, command)),
        Command::Rollout { place, command } => waiting(operate::rollout(&place, command)),
        Command::Device { place, command } => waiting(operate::device(&place, command)),
        Command::Erase { place, command } => waiting(operate::erase(&place, command)),
        Command::Broker(BrokerCommand::Rules {
            settings,
            product,
            to,
        }) => {
            let mut config = settings.read()?;
            let external = &mut config.broker.external;
            external.rules_for = product.or(external.rules_for);
            external.rules = to.or(external.rules.take());
            waiting(rules(config))
        }
        Command::Subscriber { place, command } => waiting(operate::subscriber(&place, command)),
        Command::Settings { place, command } => waiting(operate::settings(&place, command)),
        Command::User { place, command } => waiting(operate::user(&place, command)),
        Command::Token { place, command } => waiting(operate::token(&place, command)),
        Command::Audit(command) => waiting(operate::audit(command)),
        Command::Keys { data, command } => waiting(keys::run(&data, command)),
        Command::Serve(settings) => {
            let config = settings.read()?;
            log();
            give_large_blocks_back();
            tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?
                .block_on(serve(config))
        }
    }
}

fn waiting(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LACEWING_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Someone who uses the library may have set up a log of their own.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
}

async fn bring(import: &Import) -> anyhow::Result<()> {
    let (address, token) = (import.place.address()?, import.place.token()?);
    if token.is_none() {
        anyhow::bail!("nobody may bring images without a token: {HOW}");
    }
    let target = format!(
        "/api/v1/tasks/{}/import?format={}&holdout={}&author={}",
        import.task,
        import.format.as_str(),
        import.holdout,
        in_query(&import.author),
    );
    let data = import.place.data();
    let report = send(address, data, token.as_deref(), &target, &import.folder).await?;
    println!(
        "{} new images, {} known; {} labelled, {} had a label; {} errors",
        report.imported, report.known, report.labelled, report.kept, report.failed
    );
    for error in &report.errors {
        eprintln!("{}: {}", error.path, error.error);
    }
    if report.imported + report.known == 0 {
        anyhow::bail!("no image could be used");
    }
    Ok(())
}

async fn rules(config: Config) -> anyhow::Result<()> {
    let written = broker::outside::write_once(&config).await?;
    println!("{written}");
    Ok(())
}

/// Makes the allocator give large blocks back to the system at once: what a password is hashed in (19 MiB), a picture, a table. It
/// would keep them otherwise, fill the gaps with small things, and take a new one for the next hash: a crowd of guesses
/// left half a gigabyte behind.
fn give_large_blocks_back() {
    #[cfg(target_env = "gnu")]
    {
        /// Blocks of this size and more are mapped on their own; what readings and messages need is smaller.
        const MAPPED_FROM: i32 = 4 * 1024 * 1024;
        #[expect(
            unsafe_code,
            reason = "mallopt only sets a number, before other threads exist"
        )]
        // SAFETY: called once, before the runtime and the coordinator start their threads.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
        }
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let (mut interrupt, mut terminate) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    let handle = Coordinator::start(config).await?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tracing::info!("stopping");
    handle.stop().await;
    Ok(())
}
