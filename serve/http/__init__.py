"""The layers between the network and the routes: connections, checks of each request, health, metrics."""
