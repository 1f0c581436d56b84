//! How often somebody may ask.
//!
//! Who shows what counts is limited as itself, everybody else by address. Each has one of a fixed number of places,
//! chosen by a hash that nobody can foresee, so that what is remembered is bounded whoever asks; two who share a place
//! share its limit.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    net::IpAddr,
    num::NonZeroU32,
    time::Duration,
};

use governor::{
    DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};

use super::problem::Problem;

/// Places of each limit: a fleet of some ten thousand has one each, nearly. Some megabytes if all are taken.
const PLACES: u64 = 1 << 18;

/// A person or a program, per second and at once: the console asks a few times a second, and a script that reads a
/// million readings in pages of 1,000 asks 1,000 times in a row.
const USER: (u32, u32) = (100, 3_000);
/// A device, per second and at once: a model of 512 MiB has 8,192 chunks, which are fetched at the speed of its link,
/// and a shelf of samples is sent after days without one.
const DEVICE: (u32, u32) = (200, 10_000);
/// Frames of a device that the coordinator is to look at, per second and at once: a third of those of a fast camera.
const OFFLOAD: (u32, u32) = (10, 30);
/// An address that shows nothing, per second and at once: pages, their files, and questions of a load balancer, for
/// all who are behind it.
const ADDRESS: (u32, u32) = (50, 1_000);
/// Seconds per attempt and attempts at once. An address: an office that comes to work. A name: who has forgotten a
/// password tries some; who guesses has 2,880 a day, of at least 10 characters.
const LOGIN_ADDRESS: (u64, u32) = (2, 60);
const LOGIN_NAME: (u64, u32) = (30, 10);
/// Seconds per attempt and attempts at once: one person opens one link.
const SETUP: (u64, u32) = (10, 10);
/// Per second and at once: a site of a thousand devices that is switched on behind one address. Each costs a signature.
const ENROL: (u32, u32) = (10, 1_000);
/// Seconds per line and lines at once of refusals of one principal that are written to the audit log. The counter
/// counts all of them; the log must not be filled by who is refused.
const REFUSALS: (u64, u32) = (10, 20);

type Limiter = DefaultKeyedRateLimiter<u32>;

fn often(per_second: u32, at_once: u32) -> Limiter {
    let one = NonZeroU32::MIN;
    let quota = Quota::per_second(NonZeroU32::new(per_second).unwrap_or(one));
    RateLimiter::dashmap(quota.allow_burst(NonZeroU32::new(at_once).unwrap_or(one)))
}

fn seldom(seconds: u64, at_once: u32) -> Limiter {
    let one = NonZeroU32::MIN;
    let quota = Quota::with_period(Duration::from_secs(seconds)).unwrap_or(Quota::per_second(one));
    RateLimiter::dashmap(quota.allow_burst(NonZeroU32::new(at_once).unwrap_or(one)))
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    User,
    Device,
    Offload,
    Address,
    LoginAddress,
    LoginName,
    Setup,
    Enrol,
    Refusals,
}

/// All limits.
pub(crate) struct Limits {
    places: RandomState,
    user: Limiter,
    device: Limiter,
    offload: Limiter,
    address: Limiter,
    login_address: Limiter,
    login_name: Limiter,
    setup: Limiter,
    enrol: Limiter,
    refusals: Limiter,
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Limits")
    }
}

impl Limits {
    pub(crate) fn new() -> Self {
        Self {
            places: RandomState::new(),
            user: often(USER.0, USER.1),
            device: often(DEVICE.0, DEVICE.1),
            offload: often(OFFLOAD.0, OFFLOAD.1),
            address: often(ADDRESS.0, ADDRESS.1),
            login_address: seldom(LOGIN_ADDRESS.0, LOGIN_ADDRESS.1),
            login_name: seldom(LOGIN_NAME.0, LOGIN_NAME.1),
            setup: seldom(SETUP.0, SETUP.1),
            enrol: often(ENROL.0, ENROL.1),
            refusals: seldom(REFUSALS.0, REFUSALS.1),
        }
    }

    /// Counts one; if it is too many, after how many seconds there may be another.
    pub(crate) fn check(&self, what: What, who: impl Hash) -> Result<(), u64> {
        let limiter = match what {
            What::User => &self.user,
            What::Device => &self.device,
            What::Offload => &self.offload,
            What::Address => &self.address,
            What::LoginAddress => &self.login_address,
            What::LoginName => &self.login_name,
            What::Setup => &self.setup,
            What::Enrol => &self.enrol,
            What::Refusals => &self.refusals,
        };
        let place = self.places.hash_one(who) % PLACES;
        limiter
            .check_key(&u32::try_from(place).unwrap_or(0))
            .map_err(|until| {
                let wait = until.wait_time_from(DefaultClock::default().now());
                wait.as_secs() + 1
            })
    }
}

/// The answer to one too many.
pub(super) fn too_many(seconds: u64) -> Problem {
    let detail = format!("too many requests, try again in {seconds} s");
    Problem::new(429, "Too many requests", detail).after(seconds)
}

/// What stands for an address: who has one of version 6 has 2⁶⁴ of them.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let network = u128::from(v6) & !u128::from(u64::MAX);
            IpAddr::V6(network.into())
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_limit_and_is_told_when_to_come_back() {
        let limits = Limits::new();
        for _ in 0..LOGIN_NAME.1 {
            limits.check(What::LoginName, "ana").unwrap();
        }
        let wait = limits.check(What::LoginName, "ana").unwrap_err();
        assert!((1..=LOGIN_NAME.0 + 1).contains(&wait), "{wait}");
        limits.check(What::LoginName, "ben").unwrap();
        limits.check(What::LoginAddress, "ana").unwrap();
    }

    #[test]
    fn a_household_is_one_address() {
        let net = |text: &str| network(text.parse().unwrap());
        assert_eq!(net("2001:db8::1"), net("2001:db8::ffff:1:2:3"));
        assert_ne!(net("2001:db8::1"), net("2001:db8:0:1::1"));
        assert_eq!(net("::ffff:10.0.0.1"), net("10.0.0.1"));
        assert_ne!(net("10.0.0.1"), net("10.0.0.2"));
    }
}
