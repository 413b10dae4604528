//! The connection to the API server.

use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use tower::ServiceBuilder;

/// TCP keepalive: how long a connection is silent before the first probe.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// The connection fails after this many unanswered probes.
const KEEPALIVE_PROBES: u32 = 3;
/// Short, and tried again by us: the kernel doubles the interval of its SYN retransmissions, and would notice a
/// returning server late.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of the API server that pod or kubeconfig name, and its address.
///
/// A watch only receives: when the API server's machine dies without closing its connections, nothing shows that they
/// are dead. Keepalive makes the watch fail after 25 s; without it kube gives it up after 5 minutes.
///
/// # Errors
/// When there is no configuration, or it makes no sense.
pub async fn connect() -> Result<(Client, String), ConnectError> {
    let config = Config::infer().await?;
    let server = config.cluster_url.to_string();
    Ok((client(config)?, server))
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no way to the API server: neither a ServiceAccount of a pod nor a kubeconfig is here")]
    NoConfig(#[from] kube::config::InferConfigError),
    #[error("cannot make a client of the API server")]
    BadConfig(#[from] kube::Error),
}

fn client(config: Config) -> kube::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    connector.set_keepalive(Some(KEEPALIVE_IDLE));
    connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    connector.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    // Keepalive does not probe while sent data is unacknowledged: the same limit for that.
    connector.set_tcp_user_timeout(Some(KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_PROBES));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
