//! Enrolment against a real database.

use mesh_core::Name;
use rcgen::KeyPair;

use super::{
    super::{csr::tests::request, token_rows::NewToken},
    *,
};

const NOW: i64 = 1_700_000_000_000;
const HOUR: i64 = 3_600_000;

struct House {
    _dir: tempfile::TempDir,
    records: Arc<Records>,
    authority: Arc<Authority>,
    devices: Arc<Devices>,
    site: Name,
}

impl House {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::trust(dir.path()).await.unwrap());
        let authority = Arc::new(Authority::open(dir.path()).unwrap());
        let devices = Self::open(&records, &authority).await;
        Self {
            _dir: dir,
            records,
            authority,
            devices,
            site: "demo".parse().unwrap(),
        }
    }

    async fn open(records: &Arc<Records>, authority: &Arc<Authority>) -> Arc<Devices> {
        let life = Duration::from_secs(10);
        let devices = Devices::open(records.clone(), authority.clone(), life, 100).await;
        Arc::new(devices.unwrap())
    }

    async fn token(&self, quota: i64, needs_approval: bool) -> String {
        let new = NewToken {
            site: &self.site,
            device: None,
            quota,
            needs_approval,
            expires_ms: NOW + HOUR,
            by: "me",
        };
        self.devices.new_token(new, NOW).await.unwrap()
    }

    async fn enrol(
        &self,
        jti: &str,
        device: &str,
        key: &KeyPair,
        now: i64,
    ) -> Result<Enrolled, DeviceError> {
        let csr = Csr::read(&request(key, |_| {})).unwrap();
        let device: Name = device.parse().unwrap();
        self.devices
            .enrol(jti, (&self.site, &device), &csr, now)
            .await
    }
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn fingerprint_of(key: &KeyPair) -> Fingerprint {
    Csr::read(&request(key, |_| {})).unwrap().fingerprint
}

fn why(done: Result<Enrolled, DeviceError>) -> Refusal {
    match done {
        Err(DeviceError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_at_once_with_one_token_are_one() {
    let house = House::new().await;
    let jti: Arc<str> = house.token(1, false).await.into();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..1_000 {
        let (devices, site, jti) = (house.devices.clone(), house.site.clone(), jti.clone());
        tasks.spawn(async move {
            let csr = Csr::read(&request(&key(), |_| {})).unwrap();
            let device: Name = format!("d{n}").parse().unwrap();
            devices.enrol(&jti, (&site, &device), &csr, NOW).await
        });
    }
    let (mut certificates, mut refused) = (0, 0);
    while let Some(done) = tasks.join_next().await {
        match done.unwrap() {
            Ok(Enrolled::Issued(_)) => certificates += 1,
            other => {
                assert_eq!(why(other), Refusal::UsedUp);
                refused += 1;
            }
        }
    }
    assert_eq!((certificates, refused), (1, 999));
    assert_eq!(house.devices.active.count(), 1);
    let rows = house.devices.identities(None, ("", ""), 10).await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(house.devices.tokens().await.unwrap()[0].used, 1);
}

#[tokio::test]
async fn a_lost_answer_is_given_again_and_a_name_has_one_key() {
    let house = House::new().await;
    let jti = house.token(2, false).await;
    let (mine, other) = (key(), key());
    for _ in 0..5 {
        let done = house.enrol(&jti, "d1", &mine, NOW).await;
        assert!(matches!(done, Ok(Enrolled::Issued(_))));
    }
    assert_eq!(house.devices.tokens().await.unwrap()[0].used, 1);
    assert_eq!(
        why(house.enrol(&jti, "d1", &other, NOW).await),
        Refusal::NameTaken
    );
    assert_eq!(
        why(house.enrol(&jti, "d2", &mine, NOW).await),
        Refusal::KeyElsewhere
    );
    assert_eq!(
        why(house.enrol(&jti, "d2", &other, NOW + HOUR).await),
        Refusal::Expired
    );
    house.devices.revoke_token(&jti).await.unwrap();
    assert_eq!(
        why(house.enrol(&jti, "d2", &other, NOW).await),
        Refusal::TokenRevoked
    );
    assert_eq!(
        why(house.enrol("nonsense", "d2", &other, NOW).await),
        Refusal::UnknownToken
    );
}

#[tokio::test]
async fn a_person_says_yes_and_no() {
    let house = House::new().await;
    let jti = house.token(2, true).await;
    let (mine, d1): (_, Name) = (key(), "d1".parse().unwrap());
    let print = fingerprint_of(&mine);
    for _ in 0..3 {
        let done = house.enrol(&jti, "d1", &mine, NOW).await;
        assert!(matches!(done, Ok(Enrolled::Pending)));
        assert!(house.devices.active.find(&print).is_none());
    }
    let csr = Csr::read(&request(&mine, |_| {})).unwrap();
    assert!(matches!(
        house.devices.renew(&csr, |_| true, NOW).await,
        Err(DeviceError::Refused(Refusal::NotApproved))
    ));
    house.devices.approve(&house.site, &d1).await.unwrap();
    // Long after the token ran out: a person may think about it.
    let done = house.enrol(&jti, "d1", &mine, NOW + 10 * HOUR).await;
    assert!(matches!(done, Ok(Enrolled::Issued(_))));
    let peer = house.devices.active.find(&print).unwrap();

    // It stays so over a restart, and a year without a certificate changes nothing.
    let again = House::open(&house.records, &house.authority).await;
    assert!(again.active.find(&print).is_some());
    let (device, issued) = again
        .renew(&csr, |_| true, NOW + 9_000 * HOUR)
        .await
        .unwrap();
    assert_eq!(device.device, d1);
    assert_eq!(issued.not_after_ms, NOW + 9_000 * HOUR + 10_000);

    house.devices.revoke(&house.site, &d1).await.unwrap();
    assert!(peer.cut.is_cancelled() && house.devices.active.find(&print).is_none());
    assert!(matches!(
        house.devices.renew(&csr, |_| true, NOW).await,
        Err(DeviceError::Refused(Refusal::KeyRevoked))
    ));
    assert_eq!(
        why(house.enrol(&jti, "d1", &mine, NOW).await),
        Refusal::KeyRevoked
    );
    assert!(matches!(
        house.devices.approve(&house.site, &d1).await,
        Err(DeviceError::State(_))
    ));
    // The device gets a new key, and then the name again.
    let fresh = key();
    let done = house.enrol(&jti, "d1", &fresh, NOW + 1).await;
    assert!(matches!(done, Ok(Enrolled::Pending)));
    house.devices.approve(&house.site, &d1).await.unwrap();
    assert!(house.devices.active.find(&fingerprint_of(&fresh)).is_some());
    let rows = house
        .devices
        .identities(Some("demo"), ("", ""), 10)
        .await
        .unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].state, "active");
}
