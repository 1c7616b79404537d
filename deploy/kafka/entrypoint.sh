#!/bin/sh
# The broker's image starts here: formats the volume the first time, then runs Kafka in this process's place.
# KAFKA_ADVERTISED is the host:port by which clients reach it; KAFKA_HEAP the size of its heap.
set -eu
cd /opt/kafka

kafka() {
    exec java -Dlog4j2.configurationFile=log4j2.properties "$@"
}

(kafka -Xmx128m -cp 'lib/*' kafka.tools.StorageTool format \
    --cluster-id "$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | tr -d =)" --config server.properties --ignore-formatted)

kafka "-Xmx${KAFKA_HEAP}" -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -cp 'lib/*' kafka.Kafka server.properties \
    --override "listeners=PLAINTEXT://0.0.0.0:9092,CONTROLLER://127.0.0.1:9093" \
    --override "advertised.listeners=PLAINTEXT://${KAFKA_ADVERTISED}"
