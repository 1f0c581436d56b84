//! Rosters against a real database.

use jsonwebtoken::{DecodingKey, Validation};
use rcgen::KeyPair;

use super::{
    super::{
        csr::{Csr, tests::request},
        devices::Devices,
        token_rows::NewToken,
    },
    *,
};

const NOW: i64 = 1_700_000_000_000;
const LIFE: Duration = Duration::from_secs(1_000);

struct House {
    _dir: tempfile::TempDir,
    authority: Arc<Authority>,
    devices: Devices,
}

impl House {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::trust(dir.path()).await.unwrap());
        let authority = Arc::new(Authority::open(dir.path()).unwrap());
        let devices = Devices::open(records, authority.clone(), LIFE, 100)
            .await
            .unwrap();
        Self {
            _dir: dir,
            authority,
            devices,
        }
    }

    async fn enrol(&self, site: &str, device: &str) -> Csr {
        let (site, device): (Name, Name) = (site.parse().unwrap(), device.parse().unwrap());
        let token = NewToken {
            site: &site,
            device: None,
            quota: 1,
            needs_approval: false,
            expires_ms: NOW + 1_000,
            by: "me",
        };
        let jti = self.devices.new_token(token, NOW).await.unwrap();
        let csr = Csr::read(&request(&KeyPair::generate().unwrap(), |_| {})).unwrap();
        self.devices
            .enrol(&jti, (&site, &device), &csr, NOW)
            .await
            .unwrap();
        csr
    }

    /// A site's roster, verified with nothing but the authority's certificate.
    async fn of(&self, site: &str, now_ms: i64) -> (u64, Roster, String) {
        let site: Name = site.parse().unwrap();
        let (version, signed) = self.devices.rosters.of(&site, now_ms).await.unwrap();
        let (_, ca) = x509_parser::parse_x509_certificate(self.authority.certificate()).unwrap();
        let key = DecodingKey::from_ec_der(&ca.public_key().subject_public_key.data);
        let mut rules = Validation::new(Algorithm::ES256);
        rules.validate_exp = false;
        let read = jsonwebtoken::decode::<Roster>(&signed, &key, &rules).unwrap();
        assert_eq!(read.header.typ.as_deref(), Some(ROSTER_TYP));
        assert_eq!(read.claims.version, version);
        read.claims.check(&site, None, now_ms).unwrap();
        (version, read.claims, signed)
    }
}

fn names(roster: &Roster) -> Vec<&str> {
    roster.members.iter().map(|m| m.device.as_str()).collect()
}

#[tokio::test]
async fn names_who_is_let_in_and_is_new_only_when_that_changes() {
    let house = House::new().await;
    let one = house.enrol("hall", "d1").await;
    house.enrol("yard", "d9").await;
    let (first, roster, signed) = house.of("hall", NOW).await;
    assert_eq!(names(&roster), ["d1"]);
    assert_eq!(Some(roster.members[0].peer), one.peer);
    let again = house.of("hall", NOW + 60_000).await;
    assert_eq!(again, (first, roster, signed));

    house.enrol("hall", "d2").await;
    let (second, roster, _) = house.of("hall", NOW).await;
    assert!(second > first);
    assert_eq!(names(&roster), ["d1", "d2"]);
    let (_, other, _) = house.of("yard", NOW).await;
    assert_eq!(names(&other), ["d9"]);

    let (hall, d1) = ("hall".parse().unwrap(), "d1".parse().unwrap());
    house.devices.revoke(&hall, &d1).await.unwrap();
    let (third, roster, _) = house.of("hall", NOW).await;
    assert!(third > second);
    assert_eq!(names(&roster), ["d2"]);
}

#[tokio::test]
async fn is_signed_anew_long_before_it_runs_out() {
    let house = House::new().await;
    house.enrol("hall", "d1").await;
    let (first, roster, _) = house.of("hall", NOW).await;
    let life_ms = i64::try_from((LIFE * LIVES).as_millis()).unwrap();
    assert!(roster.holds(NOW + life_ms - 1));
    assert_eq!(house.of("hall", NOW + life_ms / 2 - 2_000).await.0, first);
    let (second, later, _) = house.of("hall", NOW + life_ms / 2 + 2_000).await;
    assert!(second > first && later.exp > roster.exp);
}

#[tokio::test]
async fn a_device_that_came_before_rosters_is_on_it_when_it_renews() {
    let house = House::new().await;
    let csr = house.enrol("hall", "d1").await;
    {
        let mut writer = house.devices.records.writer().await;
        let mut tx = writer.begin().await.unwrap();
        sqlx::query("UPDATE identities SET peer = NULL")
            .execute(&mut *tx)
            .await
            .unwrap();
        commit(tx).await.unwrap();
    }
    assert!(house.of("hall", NOW).await.1.members.is_empty());
    house.devices.renew(&csr, |_| true, NOW).await.unwrap();
    assert_eq!(names(&house.of("hall", NOW).await.1), ["d1"]);
}
