//! Listeners that die: while they enter the directory, and with a connection in hand.

use std::net::SocketAddr;

use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::{IntentKey, IntentRef, IntentState};
use ivsmc_proto::reclaim::Census;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;

use super::process::Process;
use super::roles::{connect_options, recv};
use super::stage::{until, Ground, Leaves, Stage, LIVE};
use crate::attachment::Attachment;
use crate::{ConnectOptions, Error, Plain};

/// A live slot that listens.
const LISTENER: Census = Census { listeners: 1, ..LIVE };

dies_at! {
    an_entry_is_claimed: "directory.claimed" => |name| listens(name);
    an_entrys_details_are_written: "directory.detailed" => |name| listens(name);
    the_directorys_bound_is_raised: "directory.bounded" => |name| listens(name);
    it_listens: "directory.listening" => is_looked_up;
    it_listens_no_more: "directory.freed" => closes;
    an_intent_is_matched: "intent.matched" => |name| {
        is_connected_to(name, None, &["tcp eof", "tcp reset", "refused"]);
    };
    an_accept_is_sent: "clc.accept" => |name| {
        is_connected_to(name, None, &["smc reset", "refused"]);
    };
    a_decline_is_sent: "clc.decline" => |name| {
        is_connected_to(name, Some("GREEN"), &["tcp eof", "tcp reset"]);
    };
    an_intent_is_refused: "intent.refused" => refuses;
    an_abandoned_intent_is_freed: "intent.forgotten" => forgets;
}

fn start(stage: &Stage, name: &str, eid: Option<&str>) -> (Process, SocketAddr) {
    let role: Vec<_> = ["listener", stage.device()].into_iter().chain(eid).collect();
    let mut victim = Process::start(&role, Some((name, 1)));
    let address = victim.hear("at address").parse().unwrap();
    (victim, address)
}

fn listens(name: &str) {
    let stage = Stage::new(Ground::File);
    start(&stage, name, None).0.dies_at(name);
    stage.is_left(Leaves::Exactly(LISTENER));
    stage.heals();
}

/// Who looks the dead listener up finds it dead, and connects to nobody.
fn is_looked_up(name: &str) {
    let stage = Stage::new(Ground::File);
    let (victim, address) = start(&stage, name, None);
    victim.dies_at(name);
    stage.is_left(Leaves::Exactly(LISTENER));
    let refused = crate::connect(address, &connect_options(stage.device()), &Plain).err().unwrap();
    assert_eq!(refused.errno(), Some(111), "{refused}");
    stage.is_left(Leaves::Nothing);
    stage.heals();
}

fn closes(name: &str) {
    let stage = Stage::new(Ground::File);
    let mut victim = start(&stage, name, None).0;
    victim.hear("listening");
    victim.ends_its_input();
    victim.dies_at(name);
    stage.is_left(Leaves::Exactly(LIVE));
    stage.heals();
}

/// A client that lives connects.
fn is_connected_to(name: &str, eid: Option<&str>, expected: &[&str]) {
    let stage = Stage::new(Ground::File);
    let (mut victim, address) = start(&stage, name, eid);
    victim.hear("listening");
    let options = connect_options(stage.device());
    let options = ConnectOptions { eid: eid.map(|_| "RED".to_owned()), ..options };
    let end = match crate::connect(address, &options, &Plain) {
        Ok(session) => {
            let transport = if session.is_smc() { "smc" } else { "tcp" };
            let end = match recv(&session, &mut [0; 1]) {
                Ok(count) => {
                    assert_eq!(count, 0);
                    "eof".to_owned()
                }
                Err(Error::Reset) => "reset".to_owned(),
                Err(error) => error.to_string(),
            };
            format!("{transport} {end}")
        }
        Err(error) if error.errno() == Some(111) => "refused".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(expected.contains(&&*end), "{end}");
    victim.dies_at(name);
    stage.heals();
}

/// A client of the victim that does what a test says.
struct Client {
    attachment: std::sync::Arc<Attachment>,
    conn: Fd,
    intent: IntentRef,
}

impl Client {
    /// Connects to `address`, and waits until the intent is matched.
    fn connect(stage: &Stage, address: SocketAddr) -> Self {
        let attachment = Attachment::open(&stage.device().parse().unwrap()).unwrap();
        let region = attachment.region();
        let conn = net::tcp_socket(net::Family::V4).unwrap();
        net::bind(&conn, &"127.0.0.1:0".parse().unwrap()).unwrap();
        let client = Endpoint::from(net::local_addr(&conn).unwrap());
        let key = IntentKey { client, server: Endpoint::from(address) };
        let intent = region.publish_intent(attachment.me(), &key).unwrap();
        net::connect(&conn, &address).unwrap();
        region.connected_intent(&intent).unwrap();
        let client = Self { attachment, conn, intent };
        until("a match", || (client.state() == Some(IntentState::Matched)).then_some(()));
        client
    }

    fn state(&self) -> Option<IntentState> {
        self.attachment.region().intent_state(&self.intent)
    }
}

/// Its client speaks while it is matched: the connection is a plain one.
fn refuses(name: &str) {
    let stage = Stage::new(Ground::File);
    let (victim, address) = start(&stage, name, None);
    let client = Client::connect(&stage, address);
    net::send(&client.conn, b"plain", 0).unwrap();
    victim.dies_at(name);
    assert_eq!(client.state(), Some(IntentState::Refused));
    client.attachment.region().withdraw_intent(&client.intent).unwrap();
    drop(client);
    stage.is_left(Leaves::Exactly(LISTENER));
    stage.heals();
}

/// Its client gives up when it has committed itself.
fn forgets(name: &str) {
    let stage = Stage::new(Ground::File);
    let (victim, address) = start(&stage, name, None);
    let Client { attachment, conn, intent } = Client::connect(&stage, address);
    let region = attachment.region();
    region.commit_intent(&intent).unwrap();
    region.abandon_intent(&intent).unwrap();
    drop(conn);
    victim.dies_at(name);
    assert_eq!(region.intent_state(&intent), None);
    drop(attachment);
    stage.is_left(Leaves::Exactly(LISTENER));
    stage.heals();
}
